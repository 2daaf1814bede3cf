"""The tab Generate: one completion, shown while it is written and then read token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup
from hapo_lite.inspect.example import PROBLEM
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes, Values, problem_box
from hapo_lite.inspect.tabs.example import Example
from hapo_lite.inspect.tabs.fork import ForkPart
from hapo_lite.inspect.tabs.loading import loading
from hapo_lite.inspect.tabs.state import (
    ONE_AT_A_TIME,
    AppState,
    Session,
    Written,
    arm,
    error_note,
    explain,
    stop,
)
from hapo_lite.inspect.tabs.stream import snapshots
from hapo_lite.inspect.tabs.view import GenerationView, Update
from hapo_lite.inspect.views import Shown


class GenerateTab:
    """The tab with its events."""

    def __init__(self, app: AppState, session: gr.State) -> None:
        explain(
            "The colour of a token is what HAPO computes for it. Point at a token for its numbers, click it to keep "
            "them (Eq. 5-13)."
        )
        self.app = app
        self.session = session
        with gr.Row(elem_classes="hapo-ask"):
            self.problem = problem_box()
            start = gr.Button("Generate", variant="primary", elem_id="generate", scale=0, min_width=130)
            cancel = gr.Button("Cancel", elem_id="cancel", scale=0, min_width=110)
        with gr.Accordion("Model and sampling", open=False):
            settings = gr.Column()
            self.limits = LimitBoxes(app, "generate")
            with settings:
                self.boxes = ModelBoxes(app, "generate", self.limits)
        self.status = gr.HTML(elem_id="generate-status")
        self.example = Example()
        self.group = gr.HTML(elem_id="generate-group")
        self.view = GenerationView(app, "generated", session)
        self.fork = ForkPart(session)
        inputs = {session, self.problem, *self.boxes.inputs, *self.limits.inputs}
        start.click(arm, session, None, queue=False).then(self.stream, inputs, self.outputs, **ONE_AT_A_TIME)
        cancel.click(stop, session, None, queue=False)

    @property
    def outputs(self) -> list[Any]:
        """The components that a generation or the example fills."""
        return [self.status, self.group, *self.view.outputs, *self.fork.outputs]

    def show_example(self, session: Session, number: int) -> Update:
        """The recorded group with the tokens of one of its completions. number: of the completion, from 0 on."""
        shown = self.example.shown(number)
        sentence, group = self.example.group_html(number)
        session.written = Written(lambda: self.app.shelf.get("tiny"), self.example.settings(shown))
        filled = self.view.fill(session, shown)
        return {self.status: sentence, self.group: group, **filled, **self.fork.show(PROBLEM)}

    def stream(self, values: Values) -> Iterator[Update]:
        """The tab while tokens arrive, and at the end the whole view."""
        view = self.view
        session = values[self.session]
        try:
            nothing = {self.group: "", **view.blank(), **self.fork.hide()}
            yield {self.status: markup.note("Loading the model."), **nothing}
            settings = self.boxes.settings(values, values[self.problem], self.limits)
            load = self.boxes.loader(values)
            for text in loading(load, values[self.boxes.model]):
                yield {self.status: text}
            policy = load()
            started = time.monotonic()
            for snapshot in snapshots(policy, settings, session):
                count = f"{len(snapshot.table):,} tokens"
                if not snapshot.ended:
                    stage = "First pass, at the base temperature" if snapshot.first_pass else "Writing"
                    yield {self.status: markup.note(f"{stage}: {count}."), **view.streaming(snapshot.table)}
                    continue
                sentence = f"{count} in {time.monotonic() - started:.1f} s; {snapshot.ended}."
                shown = Shown(snapshot.trace, snapshot.table, settings.method)
                session.written = Written(load, settings)
                filled = view.fill(session, shown)
                yield {self.status: markup.note(sentence), **filled, **self.fork.show(settings.problem)}
        except (UserError, torch.OutOfMemoryError) as error:
            yield {self.status: error_note(error), **view.blank()}
