"""The tab Run: a run, the groups of an iteration, and the completions of a group, also while the run trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from hapo_lite.errors import UserError, counted
from hapo_lite.inspect import group_views, health_views, markup, views
from hapo_lite.inspect.groups import Group
from hapo_lite.inspect.health import health
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.runs import Entry, Run
from hapo_lite.inspect.tabs.run_place import Found, find, trail
from hapo_lite.inspect.tabs.state import (
    IN_ORDER,
    NO_PROGRESS,
    QUIET,
    AppState,
    Fingerprint,
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
CURVES = "curves"
"""SIDES, WORDS and CURVES are the parts of the tab that are built when a reader unfolds them."""
MOST_PROMPTS = 300
"""Prompts to choose from under "The same prompt over training"."""


class RunTab:
    """The tab with its events. It shows a run's iteration, one of its groups, or one completion of that."""

    def __init__(self, app: AppState, session: gr.State) -> None:
        self.app = app
        self.session = session
        with gr.Row(elem_classes="hapo-run-row"):
            runs = app.runs()
            self.name = gr.Dropdown(runs, value=app.first_run or None, label="Run", elem_id="run-name", scale=3)
            self.iteration = gr.Slider(0, 1, 0, step=1, label="Iteration", elem_id="run-iteration", scale=4)
            with gr.Column(min_width=110, scale=0, elem_classes="hapo-stack"):
                self.live = gr.Checkbox(True, label="Live", elem_id="run-live")
                self.reload = gr.Button("Refresh", size="sm")
        self.crumbs = gr.HTML(elem_id="run-crumbs")
        self.problems = gr.HTML(elem_id="run-problems")
        with gr.Column() as self.overview:
            self._build_overview()
        with gr.Column(visible=False) as self.group:
            self.answers = gr.HTML(elem_id="run-group")
        with gr.Column(visible=False) as self.completion:
            self.view = GenerationView(app, "opened", session)
        self.timer = gr.Timer(LIVE_SECONDS)
        self.news = gr.State()
        self.shown: list[Any] = [
            *(self.crumbs, self.iteration, self.overview, self.group, self.completion, self.prompts, self.treated),
            *(self.right, self.wrong, self.words, self.answers, *self.view.outputs),
        ]
        whole = [self.problems, self.health, self.timeline, self.curves, self.prompt, self.over]
        self.outputs: list[Any] = [self.name, *whole, *self.shown]
        self._connect_page()
        self._connect_parts()

    def _build_overview(self) -> None:
        """The parts that show a whole iteration."""
        self.health = gr.HTML(elem_id="run-health")
        self.timeline = gr.HTML(elem_id="run-timeline")
        self.prompts = gr.HTML(elem_id="run-prompts")
        self.treated = gr.HTML(elem_id="run-treated")
        with gr.Accordion("Training curves", open=False) as self.training:
            self.curves = gr.HTML(elem_id="run-curves")
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

    def _connect_page(self) -> None:
        """The events that change the run or its iteration. The page's address does so too: `tabs/page.py`."""
        session = self.session
        self.timer.tick(self.look, session, self.news, **NO_PROGRESS)
        # One event fills the page, since each further one costs a round trip. Slower parts follow after it.
        for filled in (
            self.name.input(self.open, [session, self.name], self.outputs, show_progress="minimal", **IN_ORDER),
            self.reload.click(self.refresh, [session, self.name], self.outputs, show_progress="minimal", **IN_ORDER),
            self.news.change(self.follow, session, self.outputs, **NO_PROGRESS, **IN_ORDER),
            self.iteration.input(self.turn, [session, self.iteration], self.shown, **QUIET, **IN_ORDER),
        ):
            self.complete(filled)
        self.live.input(lambda on: gr.Timer(active=on), self.live, self.timer, **NO_PROGRESS)

    def complete(self, filled: Any) -> None:
        """Add what follows once the page is filled. filled: the event that fills it."""
        filled.then(self.index, self.session, [self.problems, self.prompt], **NO_PROGRESS)

    def _connect_parts(self) -> None:
        """The events of the parts below the table."""
        self.prompt.input(self.show_prompt, [self.session, self.prompt], self.over, **QUIET)
        for part, name, outputs in (
            (self.sides, SIDES, [self.right, self.wrong]),
            (self.dual, WORDS, [self.words]),
            (self.training, CURVES, [self.curves]),
        ):
            part.expand(self.unfold(name), self.session, outputs, **NO_PROGRESS, **IN_ORDER)
            part.collapse(self.fold(name), self.session, None, **NO_PROGRESS)

    # --- the run ----------------------------------------------------------------------------------------------------

    def open(self, session: Session, name: str | None) -> Update:
        """Open a run and show its last iteration that has something to show."""
        return self.go(session, Place(name or ""))

    def go(self, session: Session, place: Place) -> Update:
        """Open the run of a place and show the place. Without an iteration, the page follows the run."""
        if session.run is None or session.run.path != self.app.root / place.run:
            session.leave_run()
            session.drawn.clear()
        if not place.run:
            hint = f"No run is open: pick one of {self.app.root}, or start with --run runs/NAME."
            return {self.problems: markup.note(hint), **self.nothing(session)}
        try:
            session.run = session.run or self.app.run(place.run)
        except UserError as error:
            return {self.problems: error_note(error), **self.nothing(session)}
        session.following = place.iteration is None
        unchanged = session.seen == fingerprint(session.run)
        whole: Update = {} if unchanged else self.overall(session, session.run)
        return whole | self.show(session, session.run, place)

    def refresh(self, session: Session, name: str | None) -> Update:
        """Read the list of runs and the open run again."""
        stays = session.place.run == name and not session.following
        session.leave_run()
        choices = gr.Dropdown(choices=self.app.runs(), value=name or None)
        return {self.name: choices, **self.go(session, session.place if stays else Place(name or ""))}

    def look(self, session: Session) -> Any:
        """The fingerprint of the run's files, if it differs from that of the page."""
        now = fingerprint(session.run) if session.run else None
        return gr.skip() if now is None or now == session.seen else now

    def follow(self, session: Session) -> Update:
        """Show what the run has written since. A reader who has picked no iteration moves on to the new last one."""
        run = session.run
        if run is None:
            return {self.curves: gr.skip()}
        place = Place(session.place.run) if session.following else session.place
        return self.overall(session, run) | self.show(session, run, place)

    def turn(self, session: Session, iteration: int) -> Update:
        """Show another iteration: the group of the same prompt if it has one, else all its prompts."""
        run = session.run
        if run is None:
            return self.nothing(session)
        here = session.place
        session.following = iteration >= max(run.iterations(), default=0)
        update = self.show(session, run, Place(here.run, int(iteration), here.stage, here.prompt), push=True)
        del update[self.iteration]  # It would fight with the reader, who may be dragging it.
        return update

    def overall(self, session: Session, run: Run) -> Update:
        """What belongs to the whole run."""
        session.seen = fingerprint(run)
        lines, problems = run.metrics()
        if not run.iterations():
            problems = [*problems, f"{run.path} has no traces yet"]
        state = health(run, lines)
        return {
            self.problems: problems_html(run, problems),
            self.health: health_views.health_html(run.path.name, state, lines, run.activity) if lines else "",
            self.timeline: health_views.health_figures(lines, state.warnings),
            **self.part(CURVES, run if CURVES in session.unfolded else None),
        }

    def index(self, session: Session) -> Update:
        """The prompts that occur in several iterations, and the problems of all files. Runs after the page is full."""
        run = session.run
        if run is None:
            return {self.prompt: gr.Dropdown(choices=[], value=None)}
        if session.indexed == session.seen:
            return {self.prompt: gr.skip()}
        session.indexed = session.seen
        problems = run.metrics()[1]
        for number in run.iterations():
            problems = problems + run.entries(number)[1]
        found = run.prompts()
        offered = found
        if len(found) > MOST_PROMPTS:
            often = set(sorted(found, key=lambda name: -len(found[name]))[:MOST_PROMPTS])
            offered = {name: entries for name, entries in found.items() if name in often}
        choices = [(f"{name}: {counted(len(entries), 'completion')}", name) for name, entries in offered.items()]
        label = "Prompt" if offered is found else f"Prompt: the {MOST_PROMPTS} recorded most often, of {len(found):,}"
        return {self.problems: problems_html(run, problems), self.prompt: gr.Dropdown(choices=choices, label=label)}

    # --- an iteration, a group and a completion ---------------------------------------------------------------------

    def nothing(self, session: Session) -> Update:
        """The tab without a run."""
        session.drawn.clear()
        session.place = Place()
        parts = [self.health, self.timeline, self.curves, self.crumbs, self.prompts, self.treated, self.answers]
        parts += [self.right, self.wrong, self.words]
        return dict.fromkeys(parts, "") | self._level("overview") | self.view.blank()

    def show(self, session: Session, run: Run, place: Place, push: bool = False) -> Update:
        """A place of the open run, or the nearest one that there is. push: add it to the browser's history."""
        found = find(run, place)
        session.place = found.place
        iterations = run.iterations()
        low, high = (iterations[0], iterations[-1]) if iterations else (0, 0)
        slider = gr.Slider(minimum=low, maximum=max(high, low + 1), value=found.number)
        names, beside = trail(found)
        # The address of a run that is followed names no iteration, so that it leads to the newest one later too.
        here = Place(place.run) if session.following and found.level == "overview" else found.place
        update: Update = {
            self.crumbs: group_views.crumbs(here, names, beside, push),
            self.iteration: slider,
            **self._level(found.level),
        }
        if not session.draws(found.level, run, found.place):
            return update
        try:
            if found.entry is not None:
                return update | self.show_completion(session, run, found.entry)
            if found.group is not None:
                return update | self.show_group(run, found, found.group)
        except UserError as error:
            del session.drawn[found.level]
            lost = error_note(error)
            if found.level == "group":
                return update | {self.answers: lost}
            return update | self.view.blank() | {self.view.summary: lost}
        return update | self.show_iteration(session, run, found)

    def _level(self, level: str) -> Update:
        """Show the parts of one level and hide those of the others."""
        parts = {"overview": self.overview, "group": self.group, "completion": self.completion}
        return {part: gr.Column(visible=name == level) for name, part in parts.items()}

    def show_iteration(self, session: Session, run: Run, found: Found) -> Update:
        """The table of an iteration's prompts, and what the update did to their tokens."""
        update: Update = {
            self.prompts: group_views.prompt_table(found.place.run, found.number, found.entries),
            self.treated: views.treated(found.entries) if found.entries else "",
        }
        for name in (SIDES, WORDS):
            update |= self.part(name, run, found.entries if name in session.unfolded else [])
        return update

    def show_group(self, run: Run, found: Found, group: Group) -> Update:
        """A group: its prompt, and its completions beside one another."""
        trace = run.trace_of(group.entries[0])
        answers = group_views.answers(run, found.place, group)
        facts = group_views.group_facts(group, answers, trace.messages, trace.gold)
        return {self.answers: facts + group_views.group_page(answers, group)}

    def show_completion(self, session: Session, run: Run, entry: Entry) -> Update:
        """One completion, token by token."""
        trace = run.trace_of(entry)
        return self.view.fill(session, Shown(trace, run.table(trace), run.settings.method))

    def part(self, name: str, run: Run | None, entries: Sequence[Entry] = ()) -> Update:
        """The content of SIDES, WORDS or CURVES. It is empty without a run; SIDES and WORDS also without entries."""
        if name == CURVES:
            return {self.curves: views.curves(run)[0] if run else ""}
        if name == SIDES:
            right, wrong = views.right_against_wrong(run, entries) if run and entries else ("", "")
            return {self.right: right, self.wrong: wrong}
        return {self.words: views.iteration_words(run, entries) if run and entries else ""}

    def unfold(self, name: str) -> Callable[[Session], Update]:
        """An event that fills a part when a reader unfolds it."""

        def fill(session: Session) -> Update:
            session.unfolded.add(name)
            run = session.run
            return self.part(name, run, find(run, session.place).entries if run else [])

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


def fingerprint(run: Run) -> Fingerprint:
    """A value that changes whenever the run has written something."""
    metrics = run.path / "metrics.jsonl"
    return run.iterations(), metrics.stat().st_mtime_ns if metrics.is_file() else 0


def problems_html(run: Run, sentences: Sequence[str]) -> str:
    """Notes on the first problems of a run's files. sentences: all but the recipe's problems."""
    problems = [*run.recipe_problems, *sentences]
    notes = [markup.note(sentence, "error") for sentence in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        notes.append(markup.note(f"and {len(problems) - MOST_PROBLEMS} more"))
    return "".join(notes)
