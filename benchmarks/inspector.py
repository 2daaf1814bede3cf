"""How fast the inspector's page is in a real browser: Debian's chromium, driven by Playwright.

    python benchmarks/inspector.py [--model FOLDER] [--tokens 4096] [--completions 1000] [--length 300]

The bundled model or that of `--model`, with a longer context and without stop tokens, generates `--tokens` tokens, in
two passes. The program measures the time until the model is loaded, how fast the page writes beside the engine alone,
the time from the last token until the page is at rest, pointing at tokens, colouring, the what-if slider and the
drawing of every figure. Then the page opens a run of `--completions` recorded completions of `--length` tokens, in one
file and in files of eight; the program measures the time from choosing the run until the page is at rest, and the same
for a group and a completion. Last it reads runs of 20 and of 500 iterations again after they have written one more. A
page is at rest when it shows what was asked for and the browser has nothing left to do but to draw figures, which take
turns; of a completion and of a live run, the program also measures the time until every figure that shows is drawn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.algo.methods import Method  # noqa: E402
from hapo_lite.algo.objective import assign_credit  # noqa: E402
from hapo_lite.algo.tokens import TokenSignals, fit_signal  # noqa: E402
from hapo_lite.cli import quiet_libraries  # noqa: E402
from hapo_lite.inspect.health_views import STAGES  # noqa: E402
from hapo_lite.model.origins import TINY_MODEL  # noqa: E402
from hapo_lite.runs.trace import Trace, write_traces  # noqa: E402
from hapo_lite.train.curves import PANELS  # noqa: E402

FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
PER_FILE = 8

AT_REST = """(selector) => new Promise((done) => {
  const look = () => document.querySelector(selector)
    ? requestIdleCallback(() => done(Date.now() / 1000)) : requestAnimationFrame(look);
  look();
})"""
FIGURES = """(selector) => new Promise((done) => {
  const look = () => {
    // A large figure is drawn when it comes into view.
    const plots = [...document.querySelectorAll(selector)]
      .filter((plot) => plot.offsetParent && window.HAPO.small(plot));
    const drawn = plots.length && plots.every((plot) => plot.matches(".js-plotly-plot"));
    if (drawn) requestIdleCallback(() => done(Date.now() / 1000));
    else setTimeout(look, 20);
  };
  look();
})"""
PRESSED = """() => {
  for (const kind of ["mousedown", "keydown"]) {
    document.addEventListener(kind, () => { window.pressed = Date.now() / 1000; }, true);
  }
}"""
"""A wait starts with the user's own event, since the driver takes a second to find an element in a long page."""
ANSWERED = """(words) => new Promise((done) => {
  const look = () => document.querySelector("#generated-what-if figcaption").textContent.includes(words)
    ? requestIdleCallback(() => done(Date.now() / 1000)) : requestAnimationFrame(look);
  look();
})"""
HOVER = """() => {
  window.hovers = [];
  document.addEventListener("pointerover", (event) => {
    if (!event.target.closest(".hapo-text .t")) return;
    // The frame after the handler has run shows the details.
    requestAnimationFrame(() => setTimeout(() => window.hovers.push(performance.now() - event.timeStamp)));
  });
}"""
DRAWN = """async () => {
  const started = performance.now();
  for (const plot of document.querySelectorAll("#generated-figures .hapo-plot, #generated-words .hapo-plot")) {
    plot.scrollIntoView();
    while (!plot.classList.contains("js-plotly-plot")) await new Promise(requestAnimationFrame);
  }
  return (performance.now() - started) / 1000;
}"""
COLOURED = """async () => {
  const choose = document.querySelector("#generated-tokens .hapo-choose"), started = performance.now();
  choose.value = "h";
  choose.dispatchEvent(new Event("change", { bubbles: true }));
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - started;
}"""


def long_model(source: Path, folder: Path, context: int) -> Path:
    """A model that never stops and takes at least `context` tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    tokenizer.add_tokens([f"<|more {i}|>" for i in range(len(tokenizer), model.config.vocab_size)])
    # The id of this token lies behind the vocabulary of the model, which therefore cannot write it.
    tokenizer.add_special_tokens({"eos_token": "<|never|>"})
    assert tokenizer.eos_token_id >= model.config.vocab_size
    model.config.max_position_embeddings = max(context, model.config.max_position_embeddings)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recorded(rng: random.Random, texts: list[str], iteration: int, sample: int, length: int) -> Trace:
    """A completion of random tokens, in the form in which training records one."""
    method = Method()
    ids = [rng.randrange(len(texts)) for _ in range(length)]
    entropy = torch.tensor([2.718 ** rng.uniform(-14.0, 1.0) for _ in ids])
    signal = fit_signal(method, entropy)
    tokens = TokenSignals.of_one(method, signal, entropy)
    ratio = torch.tensor([[rng.gauss(1.0, 0.15) for _ in ids]]).clamp_min(0.1)
    advantage = rng.choice([-1.0, 1.0]) * rng.random()
    credit = assign_credit(method, torch.tensor([advantage]), tokens, ratio)

    def short(values: torch.Tensor) -> list[float]:
        return [float(f"{v:.7g}") for v in values.flatten().tolist()]

    logp = short(-entropy)
    low, high = ratio < credit.lower, ratio > credit.upper
    clipped = ["low" if a else "high" if b else "" for a, b in zip(low[0].tolist(), high[0].tolist(), strict=True)]
    return Trace(
        stage="train",
        iteration=iteration,
        prompt_id=f"problem-{rng.randrange(100)}",
        sample=sample,
        messages=[("user", "What is 9*7+4?")],
        gold="67",
        text="".join(texts[i] for i in ids),
        reward=float(advantage > 0),
        outcome="correct" if advantage > 0 else "wrong",
        truncated=False,
        tokens={
            "id": ids,
            "text": [texts[i] for i in ids],
            "logp_sampling": logp,
            "logp_base": logp,
            "entropy": short(entropy),
            "temperature": short(1.0 + 0.05 * tokens.h),
            "logp_old": logp,
            "logp_new": logp,
            "h": short(tokens.h),
            "ratio": short(ratio),
            "advantage": [advantage] * length,
            "credit": short(credit.advantage),
            "lower": short(credit.lower),
            "upper": short(credit.upper),
            "clipped": clipped,
        },
        signal=signal,
    )


def write_runs(root: Path, completions: int, length: int) -> None:
    """Write two runs: `one_file` has all completions in one iteration, `many_files` has eight in each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    texts = [str(tokenizer.decode([i])) for i in range(len(tokenizer))]
    rng = random.Random(0)
    traces = [recorded(rng, texts, 0, i, length) for i in range(completions)]
    write_traces(root / "one_file" / "traces", 0, traces)
    for start in range(0, completions, PER_FILE):
        some = [dataclasses.replace(t, iteration=start // PER_FILE) for t in traces[start : start + PER_FILE]]
        write_traces(root / "many_files" / "traces", start // PER_FILE, some)


def write_metrics(folder: Path, iterations: int) -> None:
    """Write the metrics of a run of so many iterations, of each as many as a real run writes."""
    rng = random.Random(0)
    known = [key for _, panel in PANELS for key in panel]
    known += [*(f"seconds/{stage}" for stage in STAGES), "tokens_per_second/sampled", "memory/peak_mb"]
    lines = ({"iteration": i, **{key: rng.random() for key in known}} for i in range(1, iterations + 1))
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def engine_alone(model: Path, tokens: int) -> float:
    """Seconds in which the engine writes one completion of so many tokens, without a page or alternatives."""
    from hapo_lite.inspect.generate import ModelShelf
    from hapo_lite.records import EncodedPrompt, Prompt, Request
    from hapo_lite.rollout.draws import DrawKey, Stage
    from hapo_lite.rollout.sampling import AdaptiveTemperature
    from hapo_lite.rollout.transformers_engine import TransformersEngine

    policy = ModelShelf().get(str(model))
    prompt = Prompt("prompt", (("user", "9*7+4=?"),), answer="")
    request = Request(EncodedPrompt(0, prompt, tuple(policy.encode(prompt.chat()))), sample=0)
    engine = TransformersEngine(policy, batch_size=1, max_new_tokens=tokens)
    started = time.monotonic()
    engine.sample([request], AdaptiveTemperature(None), DrawKey(0, Stage.TRAINING, 0))
    return time.monotonic() - started


class Measurement:
    """A served page in a browser. times: of each generation's tokens, which grow while the page is used."""

    def __init__(self, page: Any, times: list[Times]) -> None:
        self.page = page
        self.times = times

    def generation(self, tokens: int) -> None:
        """Generate so many tokens and use what the page shows."""
        page = self.page
        page.get_by_role("button", name="Model and sampling").click()
        page.wait_for_timeout(1000)
        for label, value in (("Max tokens", tokens), ("Time limit, s", 600)):
            page.get_by_label(label).first.fill(str(value))
            page.keyboard.press("Tab")
        # Those of the group that the page opens on.
        page.evaluate("document.querySelectorAll('#generated-tokens .hapo-saves').forEach((node) => node.remove())")
        started = time.time()
        page.click("#generate")
        rest = page.evaluate(AT_REST, "#generated-tokens .hapo-saves")
        count = page.locator("#generated-tokens .t").count()
        times = self.times[-1]
        print(f"loaded, and the first token drawn, in {times.first - started:.1f} s")
        speed = 2 * count / (times.end - times.first)
        print(f"{count:,} tokens written twice and streamed, at {speed:.1f} tokens/s")
        print(f"page at rest {rest - times.end:.2f} s after the last token")
        self.hover(count)
        print(f"colour by another quantity: {page.evaluate(COLOURED):.0f} ms")
        print(f"every figure drawn: {page.evaluate(DRAWN):.2f} s")
        page.fill("#generated-ratio input[type=number]", "1.5")
        page.keyboard.press("Tab")
        rest = page.evaluate(ANSWERED, "ratio were 1.5")
        print(f"what-if answered: {rest - page.evaluate('window.pressed'):.2f} s")

    def hover(self, count: int, times: int = 60) -> None:
        """Point at some of `count` tokens."""
        page = self.page
        rng = random.Random(0)
        page.evaluate(HOVER)
        first = None
        for i in rng.sample(range(count), times):
            page.locator(f"#generated-tokens .t[data-i='{i}']").hover()
            page.wait_for_timeout(60)
            first = first or page.evaluate("window.hovers[0]")
        took = page.evaluate("window.hovers")
        print(
            f"hover to details, {len(took)} tokens: median {statistics.median(took):.0f} ms, most {max(took):.0f} ms, "
            f"the first {first:.0f} ms"
        )

    def run(self, name: str) -> None:
        """Open a run."""
        page = self.page
        page.locator("#run-name input").click()
        option = page.get_by_role("option", name=name)
        option.wait_for()
        page.evaluate("document.querySelectorAll('.hapo-prompts').forEach((node) => node.remove())")
        option.click()
        self.report(f"{name} opened", "#run-prompts tbody tr")
        page.locator("#run-prompts tbody a").first.click()
        self.report("its first group opened", "#run-group .hapo-answer")
        page.locator("#run-group .hapo-answer a").first.click()
        self.report("the first completion opened", "#opened-tokens .hapo-saves", "#opened-figures .hapo-plot")

    def live(self, folder: Path, iterations: int) -> None:
        """Read a run of so many iterations again after it has written one more."""
        page = self.page
        write_metrics(folder, iterations)
        page.get_by_role("button", name="Refresh").click()
        page.locator("#run-name input").click()
        page.get_by_role("option", name=folder.name).click()
        page.wait_for_selector(f"#run-health .hapo-chip:text-is('iteration {iterations}')")
        write_metrics(folder, iterations + 1)
        page.evaluate("document.querySelectorAll('#run-health section').forEach((node) => node.remove())")
        page.get_by_role("button", name="Refresh").click()
        self.report(
            f"a live run of {iterations} iterations read again", "#run-health .hapo-verdict", "#run-timeline .hapo-plot"
        )

    def report(self, what: str, selector: str, figures: str = "") -> None:
        """Print the time from the last press until the page shows `selector` and is at rest.

        figures: a selector of figures; the time until all of them that show are drawn is printed too.
        """
        ends = [self.page.evaluate(AT_REST, selector)] + ([self.page.evaluate(FIGURES, figures)] if figures else [])
        pressed = self.page.evaluate("window.pressed")
        times = [f"in {ends[0] - pressed:.2f} s", *(f"its figures drawn in {end - pressed:.2f} s" for end in ends[1:])]
        print(f"{what} {', '.join(times)}")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclasses.dataclass
class Times:
    """When a generation's first token and its last one were drawn, seconds since the epoch."""

    first: float
    end: float = 0.0


def note_times() -> list[Times]:
    """Have the inspector add the times of each generation to the list that is returned."""
    from hapo_lite.inspect.generate import GenerationSettings, Policy, Progress
    from hapo_lite.inspect.tabs import stream

    found: list[Times] = []
    generate = stream.generate

    def timed(policy: Policy, settings: GenerationSettings) -> Iterator[Progress]:
        times = None
        for progress in generate(policy, settings):
            times = times or Times(time.time())
            if progress.ended:
                times.end = time.time()
                found.append(times)
            yield progress

    stream.generate = timed
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY_MODEL, metavar="FOLDER", help="default: the bundled one")
    parser.add_argument("--tokens", type=int, default=4096, help="0: no generation")
    parser.add_argument("--completions", type=int, default=1000)
    parser.add_argument("--length", type=int, default=300)
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    quiet_libraries()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        root = Path(folder)
        write_runs(root / "runs", arguments.completions, arguments.length)
        size = (root / "runs/one_file/traces/000000.jsonl").stat().st_size / 1e6
        print(f"{arguments.completions:,} completions of {arguments.length} tokens: {size:.0f} MB")
        import app

        times = note_times()
        model = long_model(arguments.model, root / "model", arguments.tokens + 256)
        command = ["--model", str(model), "--run", str(root / "runs" / "many_files"), "--port", str(free_port())]
        _, address = app.serve(command, block=False)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        page = browser.new_page(viewport={"width": 1366, "height": 850})
        page.set_default_timeout(600_000)
        started = time.time()
        page.goto(address)
        page.wait_for_selector("#run-prompts tbody tr")
        print(f"page opened on the run in {time.time() - started:.2f} s")
        page.evaluate(PRESSED)
        page.get_by_role("tab", name="Generate").click()
        measurement = Measurement(page, times)
        if arguments.tokens:
            measurement.generation(arguments.tokens)
        page.get_by_role("tab", name="Run").click()
        for name in ("one_file", "many_files"):
            measurement.run(name)
        for iterations in (20, 500):
            measurement.live(root / "runs" / f"live{iterations}", iterations)
        browser.close()
        if arguments.tokens:
            print(f"the engine alone: {arguments.tokens / engine_alone(model, arguments.tokens):.1f} tokens/s")


if __name__ == "__main__":
    main()
