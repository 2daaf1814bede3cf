"""The tab Generate: one completion, shown while it is written and then read token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes, Values, problem_box
from hapo_lite.inspect.tabs.fork import ForkPart
from hapo_lite.inspect.tabs.loading import loading
from hapo_lite.inspect.tabs.state import NO_PROGRESS, ONE_AT_A_TIME, AppState, Written, arm, error_note, explain, stop
from hapo_lite.inspect.tabs.stream import snapshots
from hapo_lite.inspect.tabs.view import GenerationView, Update
from hapo_lite.inspect.views import Shown


class GenerateTab:
    """The tab with its events."""

    def __init__(self, app: AppState, session: gr.State) -> None:
        explain("The colour of a token is what HAPO computes for it. Point at a token to read its numbers (Eq. 5-13).")
        self.session = session
        self.problem = problem_box()
        with gr.Accordion("Model and sampling", open=False):
            settings = gr.Column()
            self.limits = LimitBoxes(app, "generate")
            with settings:
                self.boxes = ModelBoxes(app, "generate", self.limits)
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            cancel = gr.Button("Cancel", elem_id="cancel")
        self.status = gr.HTML(elem_id="generate-status")
        self.view = GenerationView(app, "generated", session)
        self.fork = ForkPart(session)
        inputs = {session, self.problem, *self.boxes.inputs, *self.limits.inputs}
        written = start.click(arm, session, None, queue=False).then(
            self.stream, inputs, [self.status, *self.view.outputs, *self.fork.outputs], **ONE_AT_A_TIME
        )
        written.then(self.view.write_csv, session, self.view.csv, **NO_PROGRESS)
        cancel.click(stop, session, None, queue=False)

    def stream(self, values: Values) -> Iterator[Update]:
        """The tab while tokens arrive, and at the end the whole view."""
        view = self.view
        session = values[self.session]
        try:
            yield {self.status: markup.note("Loading the model."), **view.blank(), **self.fork.hide()}
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
