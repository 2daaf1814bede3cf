"""Run: a run's curves and its recorded completions, also while it trains."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.runs import Entry, Run
from hapo_lite.inspect.tabs.desk import QUIET, Desk, Session, Shown, failed, reading
from hapo_lite.inspect.tabs.view import GenerationView, Update

LIVE_SECONDS = 5.0
MOST_PROBLEMS = 5
SIDES, WORDS = "sides", "words"
"""The parts that are made when they are unfolded."""


class RunTab:
    def __init__(self, desk: Desk, blocks: gr.Blocks, session: gr.State) -> None:
        self.desk = desk
        reading("A run as it was recorded: pick an iteration and a completion; marked tokens were clipped (Eq. 5-13).")
        with gr.Row(elem_classes="hapo-run-row"):
            runs = desk.runs()
            self.name = gr.Dropdown(runs, value=desk.first_run or None, label="Run", elem_id="run-name", scale=3)
            live = gr.Checkbox(
                True, label="Live", info=f"re-read every {LIVE_SECONDS:g} s", scale=1, elem_id="run-live"
            )
            refresh = gr.Button("Refresh", scale=1, size="sm")
        self.problems = gr.HTML(elem_id="run-problems")
        with gr.Accordion("Training curves", open=True):
            self.curves = gr.HTML(elem_id="run-curves")
        with gr.Row():
            self.iteration = gr.Slider(0, 1, 0, step=1, label="Iteration", elem_id="run-iteration")
            self.completion = gr.Dropdown([], label="Completion", elem_id="run-completion")
        self.treated = gr.HTML(elem_id="run-treated")
        self.view = GenerationView(desk, "opened", session)
        with gr.Accordion("Right against wrong, this iteration", open=False) as sides:
            reading("Completions of this iteration coloured by entropy: look where they part (Eq. 5).")
            with gr.Row():
                with gr.Column(min_width=320):
                    gr.HTML('<h3 class="hapo-h">Right</h3>')
                    self.right = gr.HTML(elem_id="run-right")
                with gr.Column(min_width=320):
                    gr.HTML('<h3 class="hapo-h">Not right</h3>')
                    self.wrong = gr.HTML(elem_id="run-wrong")
        with gr.Accordion("The same word at high and low entropy, this iteration", open=False) as words:
            self.words = gr.HTML(elem_id="run-words")
        with gr.Accordion("The same prompt over training", open=False):
            reading("One prompt's completions, first iteration first, coloured by entropy (Eq. 5).")
            self.prompt = gr.Dropdown([], label="Prompt", elem_id="run-prompt")
            self.over = gr.HTML(elem_id="run-over")
        timer = gr.Timer(LIVE_SECONDS)
        news = gr.State()

        opening = [self.problems, self.curves, self.iteration, self.prompt, self.over]
        showing = [self.completion, self.treated, self.right, self.wrong, self.words, *self.view.outputs]
        where = [session, self.iteration, self.completion]
        everything, quiet = [*opening, *showing], {"show_progress": "hidden"}
        timer.tick(self.look, session, news, **quiet)
        # One event fills the page, since every further one would cost a round trip; what may come later follows.
        for filled in (
            gr.on([self.name.input, blocks.load], self.open, [session, self.name], everything, show_progress="minimal"),
            refresh.click(self.refresh, [session, self.name], [self.name, *everything], show_progress="minimal"),
            news.change(self.follow, where, everything, **quiet),
            self.iteration.input(self.show, where, showing, **QUIET),
            self.completion.input(self.show_completion, where, self.view.outputs, **QUIET),
        ):
            filled.then(self.view.write_csv, session, self.view.csv, **quiet).then(
                self.index, session, [self.problems, self.prompt], **quiet
            )
        self.prompt.input(self.show_prompt, [session, self.prompt], self.over, **QUIET)
        live.input(lambda on: gr.Timer(active=on), live, timer, **quiet)
        for part, name, outputs in (
            (sides, SIDES, [self.right, self.wrong]),
            (words, WORDS, [self.words]),
        ):
            part.expand(self.unfold(name), [session, self.iteration], outputs, **quiet)
            part.collapse(self.fold(name), session, None, **quiet)

    # --- the run ----------------------------------------------------------------------------------------------------

    def open(self, session: Session, name: str | None) -> Update:
        """Open a run and show it; the slider goes to its last iteration."""
        if session.run is None or session.run.path != self.desk.root / (name or ""):
            session.run = session.on_page = None
        if not name:
            hint = f"No run is open: pick one of {self.desk.root}, or start with --run runs/NAME."
            return {self.problems: markup.note(hint), self.curves: "", **self.show(session, 0, None)}
        try:
            session.run = session.run or self.desk.run(name)
        except UserError as error:
            return {self.problems: failed(error), self.curves: "", **self.show(session, 0, None)}
        return self.overview(session)

    def refresh(self, session: Session, name: str | None) -> Update:
        session.run = None
        return {self.name: gr.Dropdown(choices=self.desk.runs()), **self.open(session, name)}

    def look(self, session: Session) -> Any:
        """What the run's files look like, if that has changed since they were shown."""
        now = fingerprint(session.run) if session.run else None
        return gr.skip() if now is None or now == session.seen else now

    def follow(self, session: Session, iteration: int, completion: int | None) -> Update:
        """As `overview`; a reader who stands at the last iteration is taken along."""
        if session.run is None:
            return {self.curves: gr.skip()}
        shown = session.seen[0] if session.seen else []
        at_end = not shown or iteration >= shown[-1]
        return self.overview(session, None if at_end else iteration, completion)

    def overview(self, session: Session, iteration: int | None = None, completion: int | None = None) -> Update:
        """The whole tab, at an iteration or at the last one."""
        run = session.run
        session.seen = fingerprint(run)
        curves, troubles = views.curves(run)
        iterations = run.iterations()
        low, high = (iterations[0], iterations[-1]) if iterations else (0, 0)
        iteration = high if iteration is None else iteration
        if iterations:
            troubles = troubles + run.entries(nearest(run, iteration))[1]
        else:
            troubles = [*troubles, f"{run.path} has no traces yet"]
        return {
            self.problems: problems_html(run, troubles),
            self.curves: curves,
            self.iteration: gr.Slider(minimum=low, maximum=max(high, low + 1), value=iteration),
            **self.show(session, iteration, completion),
        }

    def index(self, session: Session) -> Update:
        """After the page is filled: the prompts that were met several times, and what cannot be read, in all files."""
        run = session.run
        if run is None:
            return {self.prompt: gr.Dropdown(choices=[], value=None)}
        troubles = run.metrics()[1]
        for number in run.iterations():
            troubles = troubles + run.entries(number)[1]
        choices = [(f"{name}: {len(entries)} completions", name) for name, entries in run.prompts().items()]
        return {self.problems: problems_html(run, troubles), self.prompt: gr.Dropdown(choices=choices)}

    # --- an iteration and a completion ------------------------------------------------------------------------------

    def show(self, session: Session, iteration: int, completion: int | None) -> Update:
        """An iteration, and one of its completions: the one that was shown, else the first."""
        run = session.run
        if run is None:
            nothing = {self.treated: "", self.right: "", self.wrong: "", self.words: ""}
            empty = gr.Dropdown(choices=[], value=None)
            return {self.completion: empty, **nothing, **self.show_completion(session, iteration, None)}
        number = nearest(run, iteration)
        entries, _ = run.entries(number)
        places = [entry.place for entry in entries]
        choices = [(entry.title, entry.place) for entry in entries]
        value = completion if completion in places else places[0] if places else None
        update = {
            self.completion: gr.Dropdown(choices=choices, value=value, label=f"Completion of iteration {number}"),
            self.treated: views.treated(entries),
        }
        for name in (SIDES, WORDS):
            update |= self.part(name, run, entries if name in session.unfolded else [])
        return update | self.show_completion(session, iteration, value)

    def show_completion(self, session: Session, iteration: int, place: int | None) -> Update:
        run = session.run
        traces = run.traces(nearest(run, iteration))[0] if run and place is not None else []
        if place is None or not 0 <= place < len(traces):
            session.on_page = None
            return self.view.blank()
        this = run.path, nearest(run, iteration), place, run.stamp(nearest(run, iteration))
        if session.on_page == this:
            # A live run is read again and again: what stands there already, a reader may be reading.
            return {self.view.summary: gr.skip()}
        session.on_page = this
        return self.view.fill(session, Shown(traces[place], run.table(traces[place]), run.settings[0]))

    def part(self, name: str, run: Run, entries: list[Entry]) -> Update:
        """A part that is made when it is unfolded; without entries nothing is made."""
        if not entries:
            return {self.right: "", self.wrong: ""} if name == SIDES else {self.words: ""}
        if name == SIDES:
            return dict(zip((self.right, self.wrong), views.right_against_wrong(run, entries), strict=True))
        return {self.words: views.iteration_words(run, entries)}

    def unfold(self, name: str):
        def fill(session: Session, iteration: int) -> Update:
            session.unfolded.add(name)
            run = session.run
            return self.part(name, run, run.entries(nearest(run, iteration))[0] if run else [])

        return fill

    def fold(self, name: str):
        return lambda session: session.unfolded.discard(name)

    def show_prompt(self, session: Session, name: str | None) -> str:
        entries = session.run.prompts().get(name or "", []) if session.run else []
        try:
            return views.over_training(session.run, entries) if entries else ""
        except UserError as error:
            return failed(error)


def nearest(run: Run, iteration: int) -> int:
    """The iteration with traces that is nearest."""
    return min(run.iterations(), key=lambda i: abs(i - iteration), default=0)


def fingerprint(run: Run) -> tuple:
    """Changes whenever the run has written something."""
    metrics = run.path / "metrics.jsonl"
    return run.iterations(), metrics.stat().st_mtime_ns if metrics.is_file() else 0


def problems_html(run: Run, sentences: list[str]) -> str:
    sentences = [*run.recipe_problems, *sentences]
    shown = "".join(markup.note(sentence, "error") for sentence in sentences[:MOST_PROBLEMS])
    more = len(sentences) - MOST_PROBLEMS
    return markup.note(run.doing) * bool(run.doing) + shown + (markup.note(f"and {more} more") if more > 0 else "")
