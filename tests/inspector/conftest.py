"""The inspector's server on a folder of runs, and a browser."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import app
from hapo_lite.algo.methods import Method
from hapo_lite.inspect.tabs.state import AppState
from hapo_lite.runs.trace import write_traces
from tests.inspector.browser import CHROMIUM, FLAGS, open_tab, opened_page
from tests.inspector.traces import HOSTILE, make_trace, trained


@pytest.fixture(scope="package")
def root(tmp_path_factory):
    """A folder of runs: `plain`, two iterations of one prompt; `hostile`, with a broken line and hostile tokens."""
    root = tmp_path_factory.mktemp("inspected") / "runs"
    for iteration in (0, 1):
        traces = [make_trace(iteration=iteration, outcome="correct", reward=1.0)]
        traces += [trained(make_trace(iteration=iteration), Method(), 0.5, [1.0, 0.6, 1.0, 1.0, 1.3, 1.0])]
        write_traces(root / "plain" / "traces", iteration, traces)
    (root / "plain" / "metrics.jsonl").write_text(
        "".join(json.dumps({"iteration": i, "reward/mean": 0.1 * i}) + "\n" for i in range(5)), "utf-8"
    )
    texts = [*HOSTILE, "x" * 100_000, "שלום", "漢字"]
    attack = '<img src=x onerror="window.attacked=1"><script>window.attacked=1</script>'
    hostile = make_trace([*texts, attack], [0.5] * 9, messages=[["user", attack]], gold=attack, prompt_id=attack)
    hostile.tokens["alternatives"] = [[[attack, 0.9, 0.8]] for _ in range(len(texts) + 1)]
    hostile.tokens["entropy"] = [0.1 * (i + 1) for i in range(len(texts) + 1)]
    write_traces(root / "hostile" / "traces", 0, [hostile])
    write_traces(root / "live" / "traces", 0, [make_trace(iteration=0)])
    (root / "live" / "recipe.yaml").write_text(
        "model: {name: tiny}\ndata: {source: tiny}\nmethod: {preset: dapo, tau: 0.2}\ntraining: {iterations: 2}\n",
        "utf-8",
    )
    write_traces(root.parent / "secret" / "traces", 0, [make_trace(prompt_id="secret")])
    (root / "linked").symlink_to(root.parent / "secret")
    with (root / "hostile" / "traces" / "000000.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"foreign": true}\n')
    return root


@pytest.fixture(scope="package")
def serve():
    """serve(*arguments) -> address of a server of its own, at a port that is free; they are closed at the end."""
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")

        def start(*arguments: str) -> str:
            blocks, address = app.serve([*arguments, "--port", "0"], block=False)
            stack.callback(blocks.close)
            return address

        yield start


@pytest.fixture(scope="package")
def address(serve, root) -> str:
    """Of the server that most tests of this folder share."""
    return serve("--run", str(root / "plain"))


@pytest.fixture
def state():
    """state(run) -> what the pages of an inspector that opens on this run's folder share."""
    with contextlib.ExitStack() as stack:

        def make(run: Path) -> AppState:
            made = AppState("", "", run)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(scope="module")
def browser():
    """Of one module: while Playwright runs, no test of another can start an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(browser, address):
    with opened_page(browser, address) as page:
        yield page


@pytest.fixture
def page(shared):
    """One tab for most tests, since loading it takes longer than they do; each begins on Generate."""
    open_tab(shared, "Generate")
    return shared


@pytest.fixture
def fresh(browser, address):
    """A tab of its own."""
    with opened_page(browser, address) as page:
        yield page
