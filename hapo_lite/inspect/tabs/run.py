"""The tab Run: a run's curves and its recorded completions, also while the run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from hapo_lite.errors import UserError, counted
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.runs import Entry, Run
from hapo_lite.inspect.tabs.state import (
    NO_PROGRESS,
    QUIET,
    AppState,
    Fingerprint,
    OnPage,
    Session,
    error_note,
    explain,
)
from hapo_lite.inspect.tabs.view import GenerationView, Update
from hapo_lite.inspect.views import Shown

LIVE_SECONDS = 5.0
MOST_PROBLEMS = 5
SIDES = "sides"
WORDS = "words"
"""SIDES and WORDS are the parts of the tab that are built when a reader unfolds them."""


class RunTab:
    """The tab with its events. It shows one run, one iteration of it, and one completion of that."""

    def __init__(self, app: AppState, blocks: gr.Blocks, session: gr.State) -> None:
        self.app = app
        self.session = session
        explain("A recorded run. Pick an iteration and a completion. Marked tokens were clipped (Eq. 5-13).")
        with gr.Row(elem_classes="hapo-run-row"):
            runs = app.runs()
            self.name = gr.Dropdown(runs, value=app.first_run or None, label="Run", elem_id="run-name", scale=3)
            self.live = gr.Checkbox(
                True, label="Live", info=f"re-read every {LIVE_SECONDS:g} s", scale=1, elem_id="run-live"
            )
            self.reload = gr.Button("Refresh", scale=1, size="sm")
        self.problems = gr.HTML(elem_id="run-problems")
        with gr.Accordion("Training curves", open=True):
            self.curves = gr.HTML(elem_id="run-curves")
        with gr.Row():
            self.iteration = gr.Slider(0, 1, 0, step=1, label="Iteration", elem_id="run-iteration")
            self.completion = gr.Dropdown([], label="Completion", elem_id="run-completion")
        self.treated = gr.HTML(elem_id="run-treated")
        self.view = GenerationView(app, "opened", session)
        self._build_parts()
        self.timer = gr.Timer(LIVE_SECONDS)
        self.news = gr.State()
        self._connect_page(blocks)
        self._connect_parts()

    def _build_parts(self) -> None:
        """The parts below the completion, which begin folded."""
        with gr.Accordion("Right against wrong, this iteration", open=False) as self.sides:
            explain("Completions of this iteration, coloured by entropy. Look where they part (Eq. 5).")
            with gr.Row():
                with gr.Column(min_width=320):
                    gr.HTML('<h3 class="hapo-h">Right</h3>')
                    self.right = gr.HTML(elem_id="run-right")
                with gr.Column(min_width=320):
                    gr.HTML('<h3 class="hapo-h">Not right</h3>')
                    self.wrong = gr.HTML(elem_id="run-wrong")
        with gr.Accordion("The same word at high and low entropy, this iteration", open=False) as self.dual:
            self.words = gr.HTML(elem_id="run-words")
        with gr.Accordion("The same prompt over training", open=False):
            explain("The completions of one prompt, coloured by entropy. The first iteration comes first (Eq. 5).")
            self.prompt = gr.Dropdown([], label="Prompt", elem_id="run-prompt")
            self.over = gr.HTML(elem_id="run-over")

    def _connect_page(self, blocks: gr.Blocks) -> None:
        """The events that change the run, the iteration or the completion."""
        session = self.session
        shown = [self.completion, self.treated, self.right, self.wrong, self.words, *self.view.outputs]
        everything = [self.problems, self.curves, self.iteration, self.prompt, self.over, *shown]
        where = [session, self.iteration, self.completion]
        opening = {"fn": self.open, "inputs": [session, self.name], "outputs": everything}
        self.timer.tick(self.look, session, self.news, **NO_PROGRESS)
        # One event fills the page, since each further one costs a round trip. Slower parts follow after it.
        for filled in (
            gr.on([self.name.input, blocks.load], **opening, show_progress="minimal"),
            self.reload.click(self.refresh, [session, self.name], [self.name, *everything], show_progress="minimal"),
            self.news.change(self.follow, where, everything, **NO_PROGRESS),
            self.iteration.input(self.show, where, shown, **QUIET),
            self.completion.input(self.show_completion, where, self.view.outputs, **QUIET),
        ):
            filled.then(self.view.write_csv, session, self.view.csv, **NO_PROGRESS).then(
                self.index, session, [self.problems, self.prompt], **NO_PROGRESS
            )
        self.live.input(lambda on: gr.Timer(active=on), self.live, self.timer, **NO_PROGRESS)

    def _connect_parts(self) -> None:
        """The events of the parts below the completion."""
        self.prompt.input(self.show_prompt, [self.session, self.prompt], self.over, **QUIET)
        for part, name, outputs in (
            (self.sides, SIDES, [self.right, self.wrong]),
            (self.dual, WORDS, [self.words]),
        ):
            part.expand(self.unfold(name), [self.session, self.iteration], outputs, **NO_PROGRESS)
            part.collapse(self.fold(name), self.session, None, **NO_PROGRESS)

    # --- the run ----------------------------------------------------------------------------------------------------

    def open(self, session: Session, name: str | None) -> Update:
        """Open a run and show it. The slider goes to its last iteration."""
        if session.run is None or session.run.path != self.app.root / (name or ""):
            session.run = None
            session.on_page = None
        if not name:
            hint = f"No run is open: pick one of {self.app.root}, or start with --run runs/NAME."
            return {self.problems: markup.note(hint), self.curves: "", **self.show(session, 0, None)}
        try:
            session.run = session.run or self.app.run(name)
        except UserError as error:
            return {self.problems: error_note(error), self.curves: "", **self.show(session, 0, None)}
        return self.overview(session, session.run)

    def refresh(self, session: Session, name: str | None) -> Update:
        """Read the list of runs and the open run again."""
        session.run = None
        return {self.name: gr.Dropdown(choices=self.app.runs()), **self.open(session, name)}

    def look(self, session: Session) -> Any:
        """The fingerprint of the run's files, if it differs from that of the page."""
        now = fingerprint(session.run) if session.run else None
        return gr.skip() if now is None or now == session.seen else now

    def follow(self, session: Session, iteration: int, completion: int | None) -> Update:
        """Show what the run has written since. A reader at the last iteration moves on to the new last one."""
        run = session.run
        if run is None:
            return {self.curves: gr.skip()}
        shown = session.seen[0] if session.seen else []
        at_end = not shown or iteration >= shown[-1]
        return self.overview(session, run, None if at_end else iteration, completion)

    def overview(
        self, session: Session, run: Run, iteration: int | None = None, completion: int | None = None
    ) -> Update:
        """The whole tab. iteration: None for the last one."""
        session.seen = fingerprint(run)
        curves, problems = views.curves(run)
        iterations = run.iterations()
        low, high = (iterations[0], iterations[-1]) if iterations else (0, 0)
        chosen = high if iteration is None else iteration
        if iterations:
            problems = problems + run.entries(nearest(run, chosen))[1]
        else:
            problems = [*problems, f"{run.path} has no traces yet"]
        return {
            self.problems: problems_html(run, problems),
            self.curves: curves,
            self.iteration: gr.Slider(minimum=low, maximum=max(high, low + 1), value=chosen),
            **self.show(session, chosen, completion),
        }

    def index(self, session: Session) -> Update:
        """The prompts that occur in several iterations, and the problems of all files. Runs after the page is full."""
        run = session.run
        if run is None:
            return {self.prompt: gr.Dropdown(choices=[], value=None)}
        problems = run.metrics()[1]
        for number in run.iterations():
            problems = problems + run.entries(number)[1]
        choices = [(f"{name}: {counted(len(entries), 'completion')}", name) for name, entries in run.prompts().items()]
        return {self.problems: problems_html(run, problems), self.prompt: gr.Dropdown(choices=choices)}

    # --- an iteration and a completion ------------------------------------------------------------------------------

    def show(self, session: Session, iteration: int, completion: int | None) -> Update:
        """An iteration and one of its completions: `completion` if the iteration has it, else the first."""
        run = session.run
        if run is None:
            nothing = {self.treated: "", self.right: "", self.wrong: "", self.words: ""}
            empty = gr.Dropdown(choices=[], value=None)
            return {self.completion: empty, **nothing, **self.show_completion(session, iteration, None)}
        number = nearest(run, iteration)
        entries, _ = run.entries(number)
        places = [entry.place for entry in entries]
        choices = [(entry.title, entry.place) for entry in entries]
        first = places[0] if places else None
        value = completion if completion in places else first
        update: Update = {
            self.completion: gr.Dropdown(choices=choices, value=value, label=f"Completion of iteration {number}"),
            self.treated: views.treated(entries),
        }
        for name in (SIDES, WORDS):
            update |= self.part(name, run, entries if name in session.unfolded else [])
        return update | self.show_completion(session, iteration, value)

    def show_completion(self, session: Session, iteration: int, place: int | None) -> Update:
        """One completion. place: the number of its trace in the iteration's file; None: no completion."""
        run = session.run
        number = nearest(run, iteration) if run else 0
        traces = run.traces(number)[0] if run else []
        if run is None or place is None or not 0 <= place < len(traces):
            session.on_page = None
            return self.view.blank()
        wanted = OnPage(run.path, number, place, run.stamp(number))
        if session.on_page == wanted:
            # A live run is read again and again. What the page shows already stays, since a reader may be reading it.
            return {self.view.summary: gr.skip()}
        session.on_page = wanted
        return self.view.fill(session, Shown(traces[place], run.table(traces[place]), run.settings.method))

    def part(self, name: str, run: Run | None, entries: Sequence[Entry]) -> Update:
        """The content of SIDES or WORDS. It is empty without entries."""
        if name == SIDES:
            right, wrong = views.right_against_wrong(run, entries) if run and entries else ("", "")
            return {self.right: right, self.wrong: wrong}
        return {self.words: views.iteration_words(run, entries) if run and entries else ""}

    def unfold(self, name: str) -> Callable[[Session, int], Update]:
        """An event that fills a part when a reader unfolds it."""

        def fill(session: Session, iteration: int) -> Update:
            session.unfolded.add(name)
            run = session.run
            return self.part(name, run, run.entries(nearest(run, iteration))[0] if run else [])

        return fill

    def fold(self, name: str) -> Callable[[Session], None]:
        """An event that marks a part as folded, so it is not filled any more."""
        return lambda session: session.unfolded.discard(name)

    def show_prompt(self, session: Session, name: str | None) -> str:
        """The completions of one prompt over training. name: a key of `Run.prompts`."""
        run = session.run
        entries = run.prompts().get(name or "", []) if run else []
        try:
            return views.over_training(run, entries) if run and entries else ""
        except UserError as error:
            return error_note(error)


def nearest(run: Run, iteration: int) -> int:
    """The iteration with traces that is nearest to `iteration`; 0 if none has traces."""
    return min(run.iterations(), key=lambda i: abs(i - iteration), default=0)


def fingerprint(run: Run) -> Fingerprint:
    """A value that changes whenever the run has written something."""
    metrics = run.path / "metrics.jsonl"
    return run.iterations(), metrics.stat().st_mtime_ns if metrics.is_file() else 0


def problems_html(run: Run, sentences: Sequence[str]) -> str:
    """Notes on the run's activity and on the first problems of its files. sentences: all but the recipe's problems."""
    problems = [*run.recipe_problems, *sentences]
    notes = [markup.note(run.activity)] if run.activity else []
    notes += [markup.note(sentence, "error") for sentence in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        notes.append(markup.note(f"and {len(problems) - MOST_PROBLEMS} more"))
    return "".join(notes)
