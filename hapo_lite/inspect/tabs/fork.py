"""The part "Fork here" of the tab Generate: what would have followed another token."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from types import ModuleType

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import fork_view
from hapo_lite.inspect.fork import CANCELLED, MOST_ALTERNATIVES, MOST_CONTINUATIONS, ForkSettings, fork, processor_of
from hapo_lite.inspect.fork_view import Given
from hapo_lite.inspect.markup import note
from hapo_lite.inspect.tabs.controls import Values
from hapo_lite.inspect.tabs.state import ONE_AT_A_TIME, Session, Written, arm, error_note, explain, stop
from hapo_lite.inspect.tabs.view import Update
from hapo_lite.tasks.verify import grade
from hapo_lite.tiny.bundled import TASKS


def known_answer(problem: str) -> str:
    """The answer to a problem of a built-in task; "" for another problem."""
    found = (_answers(task).get(problem.strip(), "") for task in TASKS.values())
    return next(filter(None, found), "")


@functools.cache
def _answers(task: ModuleType) -> dict[str, str]:
    """The answers of a built-in task, by problem."""
    return {problem.prompt: str(problem.answer) for problem in task.all_problems()}


class ForkPart:
    """The part with its events. It forks the generation that the tab shows."""

    def __init__(self, session: gr.State) -> None:
        self.session = session
        with gr.Accordion("Fork here", open=True, visible=False, elem_id="fork") as self.part:
            explain(
                "Click a token above, and let the model go on from it and from its likeliest alternatives. Each square "
                "is one continuation."
            )
            with gr.Row():
                self.position = gr.Number(
                    0, label="Token", precision=0, minimum=0, elem_id="fork-position", min_width=90
                )
                self.gold = gr.Textbox("", label="Right answer", elem_id="fork-gold", min_width=110)
                self.alternatives = gr.Number(
                    4, label="Alternatives", precision=0, minimum=1, maximum=MOST_ALTERNATIVES, min_width=90
                )
                self.continuations = gr.Number(
                    24,
                    label="Continuations of each",
                    precision=0,
                    minimum=1,
                    maximum=MOST_CONTINUATIONS,
                    min_width=120,
                    elem_id="fork-continuations",
                )
                self.tokens = gr.Number(
                    256, label="Longest, tokens", precision=0, minimum=1, min_width=110, elem_id="fork-tokens"
                )
            with gr.Row(elem_classes="hapo-actions"):
                start = gr.Button("Fork", variant="primary", elem_id="fork-start")
                cancel = gr.Button("Cancel", elem_id="fork-cancel")
            self.status = gr.HTML(elem_id="fork-status")
            self.result = gr.HTML(elem_id="fork-result")
        self.outputs = [self.part, self.gold, self.status, self.result]
        inputs = {session, self.position, self.gold, self.alternatives, self.continuations, self.tokens}
        start.click(arm, session, None, queue=False).then(
            self.stream, inputs, [self.status, self.result], api_name="fork", **ONE_AT_A_TIME
        )
        cancel.click(stop, session, None, queue=False)

    def hide(self) -> Update:
        """The part before there is a generation."""
        return {self.part: gr.Accordion(visible=False)}

    def show(self, problem: str) -> Update:
        """The part for a new generation of that problem."""
        visible = gr.Accordion(visible=True)
        return {self.part: visible, self.gold: known_answer(problem), self.status: "", self.result: ""}

    def stream(self, values: Values) -> Iterator[Update]:
        """The fork while continuations arrive, and at the end the whole fork."""
        session: Session = values[self.session]
        shown, written = session.shown.get("generated"), session.written
        try:
            if shown is None or written is None:
                raise UserError("there is no generation to fork: generate one, and click a token of it")
            settings = self._settings(values, written)
            yield {self.status: note("Loading the model.")}
            policy = written.policy()
            started = time.monotonic()
            given = Given(shown.table.numbers["weight"][min(settings.position, len(shown.table) - 1)], None)
            if settings.gold:
                given = Given(given.weight, grade(shown.trace.text, settings.gold).correct)
            processor = processor_of(shown.trace, written.settings.method, written.settings.temperature)
            for state in fork(policy, shown.trace, settings, processor, lambda: session.cancel):
                status = fork_view.status(state, time.monotonic() - started)
                if state.ended == CANCELLED and not any(branch.continuations for branch in state.branches):
                    yield {self.status: note("Cancelled before any continuation was whole."), self.result: ""}
                    return
                yield {self.status: status, self.result: fork_view.fork_html(state, given)}
        except (UserError, torch.OutOfMemoryError) as error:
            yield {self.status: error_note(error), self.result: ""}

    def _settings(self, values: Values, written: Written) -> ForkSettings:
        """The settings in the boxes. Raises UserError for a value that is out of range."""
        numbers = [values[box] for box in (self.position, self.alternatives, self.continuations, self.tokens)]
        position, alternatives, continuations, tokens = (int(number or 0) for number in numbers)
        return ForkSettings(
            position=position,
            gold=(values[self.gold] or "").strip(),
            alternatives=alternatives,
            continuations=continuations,
            tokens=tokens,
            seed=written.settings.seed,
            seconds=written.settings.seconds,
        )
