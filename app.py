"""The inspector: `python app.py [--run runs/NAME]` shows what HAPO does to every token.

It reads traces and runs single generations; what the views show is made in `hapo_lite/inspect/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before gradio is imported, which is when it reads them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import plotly
import torch

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.inspect import colour, figures, markup, views
from hapo_lite.inspect.generate import MOST_SECONDS, MOST_TOKENS, GenerationSettings, ModelShelf, Progress, generate
from hapo_lite.inspect.runs import Run, open_run, run_names
from hapo_lite.inspect.tokens import TokenTable, csv_text, token_table
from hapo_lite.tiny.task import problems
from hapo_lite.trace import Trace

ASSETS = Path(views.__file__).parent
PLOTLY_FILES = Path(plotly.__file__).parent / "package_data"
LIVE_SECONDS = 5.0
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model"}
QUIET = {"show_progress": "hidden", "trigger_mode": "always_last"}


@dataclass
class Shown:
    """The generation a view shows, for its what-if."""

    trace: Trace | None = None
    table: TokenTable | None = None
    method: Method = field(default_factory=Method)


@dataclass
class Session:
    """What belongs to one browser tab."""

    generated: Shown = field(default_factory=Shown)
    opened: Shown = field(default_factory=Shown)
    cancel: bool = False
    run: Run | None = None
    seen: Any = None


class Page:
    """The views and what they share: the loaded models, the folder of runs, and a folder for downloads."""

    def __init__(self, model: str, adapter: str, run: Path | None) -> None:
        self.model, self.adapter = model, adapter
        self.root = run.parent if run else Path("runs")
        self.first_run = run.name if run else ""
        recipe = open_run(self.root, run.name).recipe if run else None
        self.system_prompt = (recipe.data.system_prompt if recipe else None) or ""
        self.shelf = ModelShelf()
        self.downloads = tempfile.TemporaryDirectory(prefix="hapo-inspect-")

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="HAPO inspector", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            gr.HTML('<h1 class="hapo-title">HAPO inspector <small>what every token is given</small></h1>')
            session = gr.State(Session())
            with gr.Tabs():
                with gr.Tab("Generate"):
                    self.generate_tab(session)
                with gr.Tab("Run"):
                    self.run_tab(blocks, session)
                with gr.Tab("Compare"):
                    self.compare_tab(session)
        return blocks

    # --- Generate ---------------------------------------------------------------------------------------------------

    def generate_tab(self, session: gr.State) -> None:
        reading("Each token is coloured by what HAPO computes for it; point at one to read it (Eq. 5-13).")
        problem = problem_box()
        with gr.Accordion("Model and sampling", open=False):
            model, adapter, quantization = self.model_boxes("generate")
            with gr.Row():
                hapo = gr.Checkbox(True, label="HAPO on", info="off: DAPO, every token alike")
                source = gr.Radio(
                    ["first pass", "opened run"],
                    value="first pass",
                    label="Signal",
                    info="fitted on a first pass over this problem at the base temperature, or the opened run's latest",
                )
            sampling = self.sampling_boxes("generate")
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            cancel = gr.Button("Cancel", elem_id="cancel")
        status = gr.HTML(elem_id="generate-status")
        view = GenerationView("generated", session, self.downloads.name)
        inputs = [session, problem, model, adapter, quantization, hapo, source, *sampling]
        start.click(arm, session, None, queue=False).then(
            self.stream, inputs, [status, *view.outputs], show_progress="hidden", **ONE_AT_A_TIME
        )
        cancel.click(stop, session, None, queue=False)
        self.generated_view = view

    def stream(
        self,
        session: Session,
        problem: str,
        model: str,
        adapter: str,
        quantization: str,
        hapo: bool,
        source: str,
        *sampling: Any,
    ) -> Iterator[list]:
        """Yields the Generate tab's outputs while tokens arrive, and the whole page at the end."""
        view = self.generated_view
        try:
            yield [markup.note("Loading the model."), *view.blank()]
            signal = latest_signal(session.run) if source == "opened run" else None
            settings = settings_of(problem, hapo, signal, *sampling)
            policy = self.shelf.get(model, adapter, quantization)
            due, started, ended = 0.0, time.monotonic(), ""
            for progress in generate(policy, settings):
                ended = progress.ended
                if session.cancel:
                    ended = "cancelled"
                    break
                if ended or time.monotonic() < due:
                    continue
                table = table_of(progress, settings, policy.tokenizer)
                which = "First pass, at the base temperature" if progress.first_pass else "Writing"
                yield [
                    markup.note(f"{which}: {len(table)} tokens."),
                    *view.streaming(markup.token_text(table, streaming=True)),
                ]
                # Every drawing sends the whole text, so long ones are drawn less often.
                due = time.monotonic() + 0.08 + 0.0004 * len(table)
            took = time.monotonic() - started
            sentence = f"{len(progress.trace.tokens['id']):,} tokens in {took:.1f} s; {ended}."
            shown = Shown(progress.trace, table_of(progress, settings, policy.tokenizer), settings.method)
            yield [markup.note(sentence), *view.fill(session, shown)]
        except (UserError, torch.OutOfMemoryError) as error:
            yield [markup.note(f"{error}", "error"), *view.blank()]

    # --- Run --------------------------------------------------------------------------------------------------------

    def run_tab(self, blocks: gr.Blocks, session: gr.State) -> None:
        reading("A run as it was recorded: pick an iteration and a completion; marked tokens were clipped (Eq. 5-13).")
        with gr.Row():
            name = gr.Dropdown(self.runs(), value=self.first_run or None, label="Run", elem_id="run-name", scale=3)
            refresh = gr.Button("Refresh", scale=1)
            live = gr.Checkbox(False, label="Live", info=f"re-read every {LIVE_SECONDS:g} s", scale=1)
        problem_list = gr.HTML(elem_id="run-problems")
        with gr.Accordion("Training curves", open=True):
            curves = gr.HTML(elem_id="run-curves")
        with gr.Row():
            iteration = gr.Slider(0, 1, 0, step=1, label="Iteration", elem_id="run-iteration")
            completion = gr.Dropdown([], label="Completion", elem_id="run-completion")
        treated = gr.HTML(elem_id="run-treated")
        view = GenerationView("opened", session, self.downloads.name)
        with gr.Accordion("Right against wrong, this iteration", open=False):
            reading("Completions of this iteration coloured by entropy: look where they part (Eq. 5).")
            with gr.Row():
                with gr.Column(min_width=320):
                    right = gr.HTML()
                with gr.Column(min_width=320):
                    wrong = gr.HTML()
        with gr.Accordion("The same word at high and low entropy, this iteration", open=False):
            words = gr.HTML()
        with gr.Accordion("The same prompt over training", open=False):
            reading("One prompt's completions, first iteration first, coloured by entropy (Eq. 5).")
            prompt = gr.Dropdown([], label="Prompt", elem_id="run-prompt")
            over = gr.HTML()
        timer = gr.Timer(LIVE_SECONDS, active=False)

        opening = [problem_list, curves, iteration, prompt, over]
        showing = [problem_list, completion, treated, right, wrong, words]
        steps = [
            gr.on([name.input, blocks.load], self.open, [session, name], opening, show_progress="minimal"),
            refresh.click(self.refresh, [session, name, iteration], [name, *opening], show_progress="minimal"),
            timer.tick(self.follow, [session, iteration], opening, show_progress="hidden"),
        ]
        for step in [*steps, iteration.input(lambda: None, **QUIET)]:
            shown = step.then(self.show_iteration, [session, iteration, completion], showing, show_progress="hidden")
            shown.then(view.bind(self.show_completion), [session, iteration, completion], view.outputs, **QUIET)
        completion.input(view.bind(self.show_completion), [session, iteration, completion], view.outputs, **QUIET)
        prompt.input(self.show_prompt, [session, prompt], over, **QUIET)
        live.input(lambda on: gr.Timer(active=on), live, timer, show_progress="hidden")

    def runs(self) -> list[str]:
        return run_names(self.root)

    def open(self, session: Session, name: str | None) -> list:
        """Open a run and show its curves; the slider goes to its last iteration."""
        if not name:
            session.run = None
            hint = f"No run is open: pick one of {self.root}, or start with --run runs/NAME."
            return [markup.note(hint), "", gr.Slider(), gr.Dropdown(), ""]
        try:
            session.run = open_run(self.root, name)
        except UserError as error:
            session.run = None
            return [markup.note(str(error), "error"), "", gr.Slider(), gr.Dropdown(choices=[], value=None), ""]
        return self.overview(session, None)

    def refresh(self, session: Session, name: str | None, iteration: int) -> list:
        outputs = self.overview(session, iteration) if session.run else self.open(session, name)
        return [gr.Dropdown(choices=self.runs()), *outputs]

    def follow(self, session: Session, iteration: int) -> list:
        """As `overview`, if anything was added; a reader who stands at the last iteration is taken along."""
        if session.run is None or fingerprint(session.run) == session.seen:
            return [gr.skip()] * 5
        at_end = session.seen is not None and session.seen[0] and iteration >= session.seen[0][-1]
        return self.overview(session, None if at_end else iteration)

    def overview(self, session: Session, iteration: int | None) -> list:
        run = session.run
        session.seen = fingerprint(run)
        curves, troubles = views.curves(run)
        iterations = run.iterations()
        low, high = (iterations[0], iterations[-1]) if iterations else (0, 0)
        slider = gr.Slider(minimum=low, maximum=max(high, low + 1), value=high if iteration is None else iteration)
        prompts = [(f"{name}: {len(entries)} completions", name) for name, entries in run.prompts().items()]
        for number in iterations:
            troubles = troubles + run.entries(number)[1]
        if not iterations:
            troubles = [*troubles, f"{run.path} has no traces yet"]
        return [problems_html(troubles), curves, slider, gr.Dropdown(choices=prompts, value=None), ""]

    def show_iteration(self, session: Session, iteration: int, completion: Any) -> list:
        run = session.run
        if run is None:
            return [gr.skip(), gr.Dropdown(choices=[], value=None), "", "", "", ""]
        iteration = nearest(run, iteration)
        entries, _ = run.entries(iteration)
        choices = [(entry.title, entry.place) for entry in entries]
        places = [entry.place for entry in entries]
        value = completion if completion in places else places[0] if places else None
        right, wrong = views.right_against_wrong(run, iteration, entries)
        heading = '<h3 class="hapo-h">{}</h3>{}'
        return [
            gr.skip(),
            gr.Dropdown(choices=choices, value=value, label=f"Completion of iteration {iteration}"),
            views.treated(entries),
            heading.format("Right", right),
            heading.format("Not right", wrong),
            views.iteration_words(run, entries),
        ]

    def show_completion(self, view: GenerationView, session: Session, iteration: int, place: int | None) -> list:
        run = session.run
        if run is None or place is None:
            return view.blank()
        traces, _ = run.traces(nearest(run, iteration))
        if not 0 <= place < len(traces):
            return view.blank()
        try:
            shown = Shown(traces[place], run.table(traces[place]), run.settings[0])
        except UserError as error:
            return view.blank(markup.note(str(error), "error"))
        return view.fill(session, shown)

    def show_prompt(self, session: Session, name: str | None) -> str:
        entries = session.run.prompts().get(name or "", []) if session.run else []
        return views.over_training(session.run, entries) if entries else ""

    # --- Compare ----------------------------------------------------------------------------------------------------

    def compare_tab(self, session: gr.State) -> None:
        reading(
            "Two settings write on one prompt with the same random numbers; underlined tokens have no counterpart on "
            "the other side (Eq. 5-8)."
        )
        problem = problem_box()
        sides = []
        with gr.Row():
            for title, on in (("Left", True), ("Right", False)):
                with gr.Column(min_width=280):
                    gr.HTML(f'<h3 class="hapo-h">{title}</h3>')
                    hapo = gr.Checkbox(on, label="HAPO on", elem_id=f"{title.lower()}-hapo")
                    sides += [hapo, *self.model_boxes(title.lower())]
        with gr.Accordion("Sampling", open=False):
            sampling = self.sampling_boxes("compare")
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            cancel = gr.Button("Cancel")
        status = gr.HTML(elem_id="compare-status")
        with gr.Row():
            with gr.Column(min_width=320):
                left = gr.HTML(elem_id="compare-left")
            with gr.Column(min_width=320):
                right = gr.HTML(elem_id="compare-right")
        inputs = [session, problem, *sides, *sampling]
        start.click(arm, session, None, queue=False).then(
            self.compare, inputs, [status, left, right], show_progress="hidden", **ONE_AT_A_TIME
        )
        cancel.click(stop, session, None, queue=False)

    def compare(
        self,
        session: Session,
        problem: str,
        left_hapo: bool,
        left_model: str,
        left_adapter: str,
        left_quantization: str,
        right_hapo: bool,
        right_model: str,
        right_adapter: str,
        right_quantization: str,
        *sampling: Any,
    ) -> Iterator[list]:
        """Yields (status, left, right) while the two sides are written, one after the other."""
        results: list[tuple[Trace, TokenTable]] = []
        try:
            for hapo, *which in (
                (left_hapo, left_model, left_adapter, left_quantization),
                (right_hapo, right_model, right_adapter, right_quantization),
            ):
                done = [markup.token_text(table, streaming=True) for _, table in results]
                settings = settings_of(problem, hapo, None, *sampling)
                policy, due = self.shelf.get(*which), 0.0
                for progress in generate(policy, settings):
                    if session.cancel:
                        raise UserError("Cancelled.")
                    if progress.ended or time.monotonic() < due:
                        continue
                    table = table_of(progress, settings, policy.tokenizer)
                    now = [*done, markup.token_text(table, streaming=True), ""][:2]
                    yield [markup.note(f"Writing the {('left', 'right')[len(done)]} side: {len(table)} tokens."), *now]
                    due = time.monotonic() + 0.08 + 0.0004 * len(table)
                results.append((progress.trace, table_of(progress, settings, policy.tokenizer)))
            yield list(views.comparison(*results))
        except (UserError, torch.OutOfMemoryError) as error:
            yield [markup.note(str(error), "error"), "", ""]

    # --- shared controls --------------------------------------------------------------------------------------------

    def model_boxes(self, side: str) -> tuple[gr.Textbox, gr.Dropdown, gr.Radio]:
        adapters = [str(p) for name in self.runs() if (p := self.root / name / "adapter").is_dir()]
        with gr.Row():
            model = gr.Textbox(
                self.model, label="Model", info="tiny (bundled), a hub name or a folder", elem_id=f"{side}-model"
            )
            adapter = gr.Dropdown(
                ["", *dict.fromkeys([self.adapter, *adapters])] if self.adapter else ["", *adapters],
                value=self.adapter,
                label="Adapter",
                info="a folder such as runs/NAME/adapter; empty: none",
                allow_custom_value=True,
                elem_id=f"{side}-adapter",
            )
            quantization = gr.Radio(["none", "nf4"], value="none", label="Quantisation", info="nf4: 4-bit base")
        return model, adapter, quantization

    def sampling_boxes(self, view: str) -> list:
        """temperature, tau, rho, most tokens, seed, seconds, system prompt."""
        with gr.Row():
            boxes = [
                gr.Slider(0.1, 2.0, 1.0, step=0.05, label="Temperature", info="T_base (Eq. 8)"),
                gr.Slider(
                    0.0, 0.5, 0.05, step=0.01, label="tau", info="how far it moves (Eq. 8)", elem_id=f"{view}-tau"
                ),
                gr.Slider(0.0, 1.0, 0.8, step=0.01, label="rho", info="quantile of the pivot (Eq. 5)"),
            ]
        with gr.Row():
            boxes += [
                gr.Number(256, label="Max tokens", precision=0, minimum=1, maximum=MOST_TOKENS),
                gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{view}-seed"),
                gr.Number(120, label="Time limit, s", minimum=1, maximum=MOST_SECONDS),
            ]
        boxes.append(
            gr.Textbox(
                self.system_prompt,
                label="System prompt",
                info="empty: none; with --run, the run's own",
                elem_id=f"{view}-system",
            )
        )
        return boxes


class GenerationView:
    """The part of a tab that shows one generation. slot: where in the session it is kept for the what-if."""

    def __init__(self, slot: str, session: gr.State, downloads: str) -> None:
        self.slot, self.downloads = slot, downloads
        self.summary = gr.HTML(elem_id=f"{slot}-summary")
        self.tokens = gr.HTML(elem_id=f"{slot}-tokens")
        self.csv = gr.DownloadButton(
            "Tokens as CSV", size="sm", visible=False, elem_id=f"{slot}-csv", elem_classes="hapo-small-button"
        )
        self.figures = gr.HTML(elem_id=f"{slot}-figures")
        with gr.Accordion("What if the ratio were r?", open=True, visible=False) as self.question:
            with gr.Row():
                self.ratio = gr.Slider(0.4, 1.9, 1.0, step=0.01, label="Ratio r", elem_id=f"{slot}-ratio")
                self.answer = gr.Radio(["right", "wrong"], value="right", label="Answer", elem_id=f"{slot}-answer")
            self.what_if = gr.HTML(elem_id=f"{slot}-what-if")
        with gr.Accordion("The same word at high and low entropy", open=True, visible=False) as self.dual:
            self.words = gr.HTML(elem_id=f"{slot}-words")
        self.outputs = [
            self.summary, self.tokens, self.csv, self.figures, self.question, self.what_if, self.dual, self.words,
            self.ratio, self.answer,
        ]  # fmt: skip
        gr.on(
            [self.ratio.change, self.answer.input], self.ask, [session, self.ratio, self.answer], self.what_if, **QUIET
        )

    def bind(self, fill: Callable) -> Callable:
        """`fill(self, ...)` as an event handler."""
        return lambda session, *rest: fill(self, session, *rest)

    def blank(self, summary: str = "") -> list:
        hidden = gr.Accordion(visible=False)
        return [summary, "", gr.DownloadButton(visible=False), "", hidden, "", hidden, "", gr.skip(), gr.skip()]

    def streaming(self, tokens: str) -> list:
        return ["", tokens, *[gr.skip()] * 8]

    def fill(self, session: Session, shown: Shown) -> list:
        setattr(session, self.slot, shown)
        parts = views.generation(shown.trace, shown.table, shown.method)
        folder = tempfile.mkdtemp(dir=self.downloads)
        file = Path(folder) / "tokens.csv"
        file.write_text(csv_text(shown.table), "utf-8")
        visible = gr.Accordion(visible=True)
        return [
            parts.summary,
            parts.tokens,
            gr.DownloadButton(value=str(file), visible=True),
            parts.figures,
            visible,
            views.what_if(shown.table, shown.method, 1.0, True),
            visible,
            parts.words,
            1.0,
            "right",
        ]

    def ask(self, session: Session, ratio: float, answer: str) -> str:
        shown: Shown = getattr(session, self.slot)
        return views.what_if(shown.table, shown.method, ratio, answer == "right") if shown.table else ""


def arm(session: Session) -> None:
    """Before a generation is queued: an earlier cancel is over."""
    session.cancel = False


def stop(session: Session) -> None:
    """The generation of this tab ends after its token, also one that still waits in the queue."""
    session.cancel = True


def reading(text: str) -> None:
    gr.HTML(markup.note(text, "reading"))


def problem_box() -> gr.Dropdown:
    examples = [p.prompt for p in problems("test")[:8]]
    return gr.Dropdown(
        examples, value=examples[0], label="Problem", info="type one or pick one", allow_custom_value=True
    )


def settings_of(
    problem: str,
    hapo: bool,
    signal: EntropySignal | None,
    temperature: float,
    tau: float,
    rho: float,
    tokens: int,
    seed: int,
    seconds: float,
    system_prompt: str,
) -> GenerationSettings:
    """What the boxes of a view say; the last seven are those of `Page.sampling_boxes`."""
    return GenerationSettings(
        problem,
        views.method_of(hapo, tau, rho),
        temperature,
        int(tokens),
        int(seed),
        seconds,
        signal,
        system_prompt.strip(),
    )


def table_of(progress: Progress, settings: GenerationSettings, tokenizer) -> TokenTable:
    return token_table(progress.trace, settings.method, settings.temperature, tokenizer)


def latest_signal(run: Run | None) -> EntropySignal:
    """The signal of the last iteration that has one. Raises UserError where there is none."""
    if run is None:
        raise UserError("no run is open: open one in the Run tab, or fit the signal on a first pass")
    for iteration in reversed(run.iterations()):
        for trace in run.traces(iteration)[0]:
            if trace.signal is not None:
                return trace.signal
    raise UserError(f"{run.path} has no training trace with a signal: fit it on a first pass")


def nearest(run: Run, iteration: int) -> int:
    """The iteration with traces that is nearest."""
    return min(run.iterations(), key=lambda i: abs(i - iteration), default=0)


def fingerprint(run: Run) -> tuple:
    """Changes whenever the run has written something."""
    metrics = run.path / "metrics.jsonl"
    return run.iterations(), metrics.stat().st_mtime_ns if metrics.is_file() else 0


def problems_html(sentences: list[str], most: int = 5) -> str:
    shown = "".join(markup.note(sentence, "error") for sentence in sentences[:most])
    return shown + (markup.note(f"and {len(sentences) - most} more") if len(sentences) > most else "")


def theme() -> gr.themes.Base:
    """System fonts: the page asks no other host for anything."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="stone",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )


def head() -> str:
    """Plotly as it was installed, the figures' templates, the page's script and its style.

    The style goes here because gradio rewrites what it is given as css, and drops container queries.
    """
    plotly_js = f"/gradio_api/file={PLOTLY_FILES / 'plotly.min.js'}"
    return (
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{(ASSETS / 'page.css').read_text('utf-8')}{colour.palette_css()}</style>"
        f'<script src="{plotly_js}" defer></script>'
        f"<script>window.HAPO_TEMPLATES = {json.dumps(figures.templates())};</script>"
        f"<script>{(ASSETS / 'page.js').read_text('utf-8')}</script>"
    )


def serve(argv: list[str] | None = None, block: bool = True) -> tuple[gr.Blocks, str]:
    """Start the inspector; returns it with its address. block: until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python app.py", description="See what HAPO does to every token.")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run to open, such as runs/tiny_cpu")
    parser.add_argument("--model", default="tiny", metavar="NAME_OR_PATH", help="hub name, folder, or tiny (bundled)")
    parser.add_argument("--adapter", default="", metavar="DIR", help="a trained adapter, such as runs/tiny_cpu/adapter")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="127.0.0.1 keeps it on this machine")
    arguments = parser.parse_args(argv)
    gr.set_static_paths([str(PLOTLY_FILES / "plotly.min.js")])
    blocks = Page(arguments.model, arguments.adapter, arguments.run).build()
    try:
        _, address, _ = blocks.queue().launch(
            server_name=arguments.host,
            server_port=arguments.port,
            prevent_thread_lock=not block,
            theme=theme(),
            head=head(),
            footer_links=[],
            quiet=not block,
        )
    except OSError as error:
        raise UserError(f"port {arguments.port} of {arguments.host} cannot be used: {error}") from error
    return blocks, address


if __name__ == "__main__":
    sys.exit(run_command(serve))
