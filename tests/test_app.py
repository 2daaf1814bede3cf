"""The inspector in a real browser: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shutil
import socket
import sys
import time
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError
from hapo_lite.inspect import inline
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf, generate
from hapo_lite.inspect.runs import open_run
from hapo_lite.inspect.tokens import show_number, token_table, what_if
from hapo_lite.runs.trace import write_traces
from tests.conftest import ROOT
from tests.test_inspect import HOSTILE, make_trace, trained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
browser_needed = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
WAIT = 15_000
"""Milliseconds that anything may take."""


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def address(root):
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    import app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks, address = app.serve(["--run", str(root / "plain"), "--port", str(port)], block=False)
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@contextlib.contextmanager
def opened_page(browser, address, **context):
    """A browser tab; an error of the page's script, or a request to another host, fails what was done with it."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
    context.set_default_timeout(WAIT)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request", lambda r: None if re.match(r"data:|blob:|http://127\.0\.0\.1:", r.url) else troubles.append(r.url)
    )
    page.goto(address)
    page.wait_for_selector("#generate")
    yield page
    context.close()
    assert not troubles


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


def filled(page, slot: str) -> None:
    """Waits for the tokens of a finished generation; while it is written they have no buttons."""
    page.wait_for_selector(f"#{slot}-tokens .hapo-saves")


def generated(page) -> None:
    # What an earlier test of the same tab generated must not pass for the new tokens.
    page.evaluate("document.querySelectorAll('#generated-tokens .hapo-saves').forEach((old) => old.remove())")
    page.click("#generate")
    filled(page, "generated")


def details(page, slot: str) -> dict[str, str]:
    page.wait_for_selector(f"#{slot}-tokens .hapo-details dl")
    names = page.locator(f"#{slot}-tokens .hapo-details dt").all_inner_texts()
    return dict(zip(names, page.locator(f"#{slot}-tokens .hapo-details dd").all_inner_texts(), strict=True))


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


@browser_needed
def test_generate_and_read_a_token(page):
    generated(page)
    page.hover("#generated-tokens .t[data-i='2']")
    policy = ModelShelf().get("tiny")
    *_, progress = generate(policy, GenerationSettings("9*7+4=?"))
    table = token_table(progress.trace, tokenizer=policy.tokenizer)
    shown = details(page, "generated")
    assert shown["Entropy"] == show_number(table.numbers["entropy"][2]) + " nats"
    for name, key in {"h": "h", "Temperature": "temperature", "Upper bound": "upper", "Lower bound": "lower"}.items():
        assert shown[name] == show_number(table.numbers[key][2])
    assert page.locator("#generated-tokens .hapo-details table tr").count() == 11
    page.focus("#generated-tokens .t[data-i='0']")
    page.keyboard.press("ArrowRight")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][1])
    page.click("#generated-tokens .t[data-i='3']")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][3])


@browser_needed
def test_colours_follow_the_chosen_quantity(page):
    generated(page)
    token = page.locator("#generated-tokens .t[data-i='0']")
    assert re.search(r"\bs[0-9a-f]\b", token.get_attribute("class"))
    page.select_option("#generated-tokens .hapo-choose", "h")
    assert re.search(r"\bd[0-9a-f]\b", token.get_attribute("class"))
    assert page.locator("#generated-tokens .hapo-legend:visible").get_attribute("data-name") == "h"
    page.select_option("#generated-tokens .hapo-choose", "entropy")


@browser_needed
def test_the_slider_asks_what_if(page):
    generated(page)
    policy = ModelShelf().get("tiny")
    *_, progress = generate(policy, GenerationSettings("9*7+4=?"))
    table = token_table(progress.trace, tokenizer=policy.tokenizer)
    page.fill("#generated-ratio input[type=number]", "1.5")
    page.keyboard.press("Tab")
    page.wait_for_selector("#generated-what-if figcaption:has-text('ratio were 1.5')")
    page.click("#generated-answer label:has-text('wrong')")
    page.wait_for_selector("#generated-what-if figcaption:has-text('answer wrong')")
    drawn = json.loads(page.locator("#generated-what-if .hapo-spec").text_content())["data"][0]["y"]
    assert drawn == what_if(table, Method(), 1.5, -1.0).credit
    page.locator("#generated-what-if").scroll_into_view_if_needed()
    plot = page.locator("#generated-what-if .js-plotly-plot")
    plot.wait_for()
    # A click on a bar shows its token in the text above.
    plot.evaluate("(plot) => plot.emit('plotly_click', { points: [{ x: 3 }] })")
    assert details(page, "generated")["h"] == show_number(table.numbers["h"][3])


@browser_needed
def test_downloads(page):
    generated(page)
    with page.expect_download() as table:
        page.click("#generated-tokens .hapo-save[data-kind=csv]")
    assert table.value.path().read_text("utf-8").startswith("position,text,entropy")
    with page.expect_download() as picture:
        page.click("#generated-tokens .hapo-save[data-kind=png]")
    assert picture.value.path().read_bytes().startswith(b"\x89PNG")
    page.locator("#generated-figures .hapo-plot").first.scroll_into_view_if_needed()
    buttons = page.locator("#generated-figures .hapo-plot").first.locator(".modebar-btn")
    with page.expect_download() as numbers:
        buttons.nth(1).click()
    assert numbers.value.path().read_text("utf-8").startswith('"series","x","y"\n')
    with page.expect_download() as figure:
        buttons.nth(0).click()
    assert figure.value.path().read_bytes().startswith(b"\x89PNG")


@browser_needed
def test_a_run_opens(page, root):
    open_tab(page, "Run")
    filled(page, "opened")
    assert page.input_value("#run-iteration input[type=number]") == "1"
    assert page.locator("#run-curves .hapo-figure").count() == 1
    page.locator("#run-completion input").click()
    page.get_by_role("option", name=re.compile("^train")).click()
    page.wait_for_selector("#opened-tokens .clip-low", state="attached")
    page.hover("#opened-tokens .t[data-i='4']")
    trace = open_run(root, "plain").traces(1)[0][1]
    assert details(page, "opened")["Credit"] == show_number(trace.tokens["credit"][4])
    clipped = page.locator("#run-treated tr:has-text('clipped low')")
    assert clipped.locator("td").all_inner_texts() == ["clipped low", "1", "·b ×1"]
    page.get_by_role("button", name="Right against wrong").click()
    page.wait_for_selector("#run-right .hapo-card")
    for kind, start in (("csv", b'"completion","outcome","tokens"'), ("png", b"\x89PNG")):
        with page.expect_download() as saved:
            page.click(f"#run-right .hapo-save[data-kind={kind}]")
        assert saved.value.path().read_bytes().startswith(start)
    page.get_by_role("button", name="The same prompt over training").click()
    page.locator("#run-prompt input").click()
    page.get_by_role("option", name=re.compile("eval: p: 2")).click()
    page.wait_for_selector("#run-over .hapo-card >> nth=1")


@browser_needed
def test_a_live_run_is_followed_and_a_reader_left_in_peace(page, root):
    open_tab(page, "Run")
    page.locator("#run-name input").click()
    page.get_by_role("option", name="live").click()
    page.wait_for_selector("#run-completion :text('iteration 0')")
    # Taken along from the last iteration to the next.
    write_traces(root / "live" / "traces", 1, [make_trace(iteration=1)])
    page.wait_for_selector("#run-completion :text('iteration 1')")
    page.fill("#run-iteration input[type=number]", "0")
    page.keyboard.press("Tab")
    page.wait_for_selector("#run-completion :text('iteration 0')")
    page.hover("#opened-tokens .t[data-i='2']")
    details(page, "opened")
    page.fill("#opened-ratio input[type=number]", "1.5")
    page.keyboard.press("Tab")
    page.wait_for_selector("#opened-what-if figcaption:has-text('ratio were 1.5')")
    write_traces(root / "live" / "traces", 2, [make_trace(iteration=2)])
    page.wait_for_function("document.querySelector('#run-iteration input[type=range]').max === '2'")
    assert page.input_value("#run-iteration input[type=number]") == "0"
    details(page, "opened")
    assert page.input_value("#opened-ratio input[type=number]") == "1.5"


@browser_needed
def test_hostile_text_stays_text(page):
    open_tab(page, "Run")
    filled(page, "opened")
    page.locator("#run-name input").click()
    page.get_by_role("option", name="hostile").click()
    page.wait_for_selector("#run-problems .hapo-error:has-text('000000.jsonl:2')")
    page.wait_for_selector("#opened-tokens .t:has-text('<script>')")
    for i in range(10):
        page.hover(f"#opened-tokens .t[data-i='{i}']")
    details(page, "opened")
    page.locator("#opened-figures .hapo-plot").first.scroll_into_view_if_needed()
    page.wait_for_selector("#opened-figures .js-plotly-plot")
    assert page.evaluate("window.attacked") is None
    assert page.locator("#opened-tokens img, #opened-tokens script, #opened-summary img").count() == 0
    assert "(100,000 characters)" in page.locator("#opened-tokens .hapo-tokens").inner_text()


@browser_needed
def test_compare_marks_differences(page, root):
    open_tab(page, "Compare")
    page.fill("#left-tau input[type=number]", "0.5")
    page.keyboard.press("Tab")
    # On this problem the two sides part at a token where the temperature decides, for any tau from 0.2 up.
    page.locator("input[aria-label='Problem']:visible").fill("3*9+26=?")
    page.keyboard.press("Enter")
    page.click("#compare")
    filled(page, "right")
    assert page.locator("#left-tokens .differs").count() and page.locator("#right-tokens .differs").count()
    assert "no counterpart" in page.locator("#compare-status").inner_text()
    scale = [page.locator(f"#{side}-tokens .hapo-legend:visible").inner_text() for side in ("left", "right")]
    assert scale[0] == scale[1]
    assert page.locator("#compare-figures .hapo-figure").count() == 2
    with page.expect_download() as table:
        page.click("#right-tokens .hapo-save[data-kind=csv]")
    assert table.value.path().read_text("utf-8").count("\n") == page.locator("#right-tokens .t").count() + 1
    page.locator("#right-run input").click()
    page.get_by_role("option", name="live").click()
    page.wait_for_function("document.querySelector('#right-tau input[type=number]').value === '0.2'")
    assert page.input_value("#right-method input") == "dapo"


@browser_needed
def test_a_user_error_is_one_sentence(fresh):
    page = fresh
    page.get_by_role("button", name="Model and sampling").click()
    # What an accordion holds is built when it opens, and takes input a moment later.
    page.wait_for_timeout(500)
    page.locator("#generate-model").locator("input, textarea").fill("./nowhere")
    page.keyboard.press("Tab")
    page.click("#generate")
    page.wait_for_selector("#generate-status .hapo-error")
    assert "is not a folder" in page.locator("#generate-status").inner_text()


def test_many_who_ask_at_once_get_their_own_answers(address):
    """By the server's own interface; benchmarks/inspector_load.py asks more of them and looks at what grows."""
    spec = importlib.util.spec_from_file_location("inspector_load", ROOT / "benchmarks" / "inspector_load.py")
    load = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = load
    spec.loader.exec_module(load)
    draw, shelf = random.Random(0), ModelShelf()
    questions = [load.Question.drawn(draw) for _ in range(16)]
    expected = [question.answered_here(shelf) for question in questions]
    assert len(set(expected)) == len(expected)
    clients = [load.Client(address, verbose=False) for _ in range(8)]
    assert load.ask_at_once(clients, questions, expected) == 0


@browser_needed
def test_two_tabs_do_not_disturb_each_other(page, fresh):
    generated(page)
    mine = page.locator("#generated-tokens .hapo-tokens").inner_text()
    assert fresh.locator("#generated-tokens .t").count() == 0
    fresh.locator("input[aria-label='Problem']").fill("2+3*4=?")
    fresh.keyboard.press("Enter")
    generated(fresh)
    assert fresh.locator("#generated-tokens .hapo-tokens").inner_text() != mine
    page.click("#generated-answer label:has-text('wrong')")
    page.wait_for_selector("#generated-what-if figcaption:has-text('answer wrong')")
    assert page.locator("#generated-tokens .hapo-tokens").inner_text() == mine


def test_the_server_gives_out_no_other_files(address, root):
    from hapo_lite.inspect.tabs.page import PLOTLY_JS

    ask = build_opener(ProxyHandler({})).open
    assert ask(f"{address}gradio_api/file={PLOTLY_JS}").status == 200
    files = [root / "plain" / "metrics.jsonl", root.parent / "secret" / "traces" / "000000.jsonl", ROOT / "app.py"]
    paths = [f"gradio_api/file={file}" for file in ("/etc/hostname", "//etc/hostname", "app.py", *files)]
    paths += [f"gradio_api/file={PLOTLY_JS.parent}/{up}/__init__.py" for up in ("..", "%2e%2e", "..%2f..")]
    paths += ["static/..%2f..%2f..%2fetc%2fhostname", "file=/etc/hostname", f"gradio_api/proxy={address}config"]
    for path in paths:
        with pytest.raises(HTTPError) as refused:
            ask(f"{address}{path}")
        assert refused.value.code in (400, 403, 404), path


def test_asked_directly_the_server_opens_no_other_runs(address, root):
    client = Client(address, verbose=False)
    for api in ("/open", "/refresh", "/_fill"):
        for name in ("../secret", "plain/../../secret", str(root.parent / "secret"), "/etc", ["x"]):
            with pytest.raises(AppError, match="not in the list of choices"):
                client.predict(name, api_name=api)
    # A link in the folder of runs is in the list; where it leads is not opened.
    shown = str(client.predict("linked", api_name="/open"))
    assert "leads out of" in shown and "secret" not in shown.replace(str(root / "linked"), "")
    with pytest.raises(AppError, match="leads out of"):
        client.predict("linked", api_name="/_fill")


def test_a_run_that_is_none_is_named(tmp_path):
    import app

    with pytest.raises(UserError, match="is no run"):
        app.serve(["--run", str(tmp_path / "nothing")], block=False)


@browser_needed
def test_tokens_stream_in_colour_and_cancel_keeps_them(page, monkeypatch):
    from hapo_lite.inspect.tabs import stream

    def slow(policy, settings):
        for progress in generate(policy, settings):
            time.sleep(0.3)
            yield progress

    monkeypatch.setattr(stream, "generate", slow)
    page.click("#generate")
    page.wait_for_selector("#generated-tokens .t[data-i='2']")
    page.select_option("#generated-tokens .hapo-choose", "h")
    page.wait_for_selector("#generated-tokens .t[data-i='3']:is(.d0, .d7, .de, .d1, .d2, .d3, .d4, .d5, .d6)")
    assert page.locator("#generated-tokens .hapo-legend:visible").get_attribute("data-name") == "h"
    page.click("#cancel")
    page.wait_for_selector("#generate-status p:has-text('cancelled')")
    filled(page, "generated")


@browser_needed
def test_on_a_phone_a_tap_shows_the_details(browser, address):
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened_page(browser, address, **phone) as page:
        generated(page)
        page.tap("#generated-tokens .t[data-i='3']")
        details(page, "generated")
        panel = page.locator("#generated-tokens .hapo-details").bounding_box()
        assert panel["y"] >= 0 and panel["y"] + panel["height"] <= 845
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@browser_needed
def test_a_view_in_a_notebook_answers_without_a_server(browser, root):
    run = open_run(root, "hostile")
    page = browser.new_context(viewport={"width": 1000, "height": 700}).new_page()
    page.set_default_timeout(WAIT)
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url))
    page.set_content(f"<p>a notebook</p>{inline.completion(run)}")
    page.wait_for_selector("iframe")
    view = page.frames[1]
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    view.hover('.t[data-i="1"]')
    view.wait_for_selector(".hapo-details dt")
    assert "0.2 nats" in view.inner_text(".hapo-details")
    assert view.evaluate("window.attacked") is None and page.evaluate("window.attacked") is None
    assert before == "rgba(0, 0, 0, 0)"  # the notebook keeps its own look
    assert not troubles
    page.context.close()


def test_what_a_view_in_a_notebook_cannot_show_is_named(root, tmp_path):
    run = open_run(root, "plain")
    assert "hapo-cards" in inline.right_against_wrong(run, iteration=0)
    with pytest.raises(UserError, match="iteration 1 has completions 0 to 1, not 2"):
        inline.completion(run, place=2)
    with pytest.raises(UserError, match="no recorded completions of iteration 7: iterations 0, 1 have some"):
        inline.completion(run, iteration=7)
    (tmp_path / "fresh" / "traces").mkdir(parents=True)
    with pytest.raises(UserError, match="no recorded completions: no iteration has any"):
        inline.completion(open_run(tmp_path, "fresh"))


def test_on_colab_no_tunnel_to_the_outside_is_opened(monkeypatch):
    import app

    asked = []
    monkeypatch.setattr("gradio.utils.colab_check", lambda: True)
    monkeypatch.setattr("gradio.networking.setup_tunnel", lambda **options: asked.append(options))
    blocks, address = app.serve(["--port", "0"], block=False)
    blocks.close()
    assert not asked and re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d+/", address)
