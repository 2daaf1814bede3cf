"""Generate: one completion, streamed and then read token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes, Values, problem_box
from hapo_lite.inspect.tabs.desk import ONE_AT_A_TIME, Desk, Shown, arm, failed, reading, stop
from hapo_lite.inspect.tabs.stream import write
from hapo_lite.inspect.tabs.view import GenerationView, Update


class GenerateTab:
    def __init__(self, desk: Desk, session: gr.State) -> None:
        reading("Each token is coloured by what HAPO computes for it; point at one to read it (Eq. 5-13).")
        self.session, self.problem = session, problem_box()
        with gr.Accordion("Model and sampling", open=False):
            settings = gr.Column()
            self.limits = LimitBoxes(desk, "generate")
            with settings:
                self.boxes = ModelBoxes(desk, "generate", self.limits)
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            cancel = gr.Button("Cancel", elem_id="cancel")
        self.status = gr.HTML(elem_id="generate-status")
        self.view = GenerationView(desk, "generated", session)
        inputs = {session, self.problem, *self.boxes.inputs, *self.limits.inputs}
        written = start.click(arm, session, None, queue=False).then(
            self.stream, inputs, [self.status, *self.view.outputs], **ONE_AT_A_TIME
        )
        written.then(self.view.write_csv, session, self.view.csv, show_progress="hidden")
        cancel.click(stop, session, None, queue=False)

    def stream(self, values: Values) -> Iterator[Update]:
        """The tab while tokens arrive, and the whole of it at the end."""
        view, session = self.view, values[self.session]
        try:
            yield {self.status: markup.note("Loading the model."), **view.blank()}
            settings = self.boxes.settings(values, values[self.problem], self.limits)
            policy = self.boxes.policy(values)
            started = time.monotonic()
            for progress, table, ended in write(policy, settings, session):
                if not ended:
                    which = "First pass, at the base temperature" if progress.first_pass else "Writing"
                    yield {self.status: markup.note(f"{which}: {len(table):,} tokens."), **view.streaming(table)}
                    continue
                sentence = f"{len(table):,} tokens in {time.monotonic() - started:.1f} s; {ended}."
                yield {
                    self.status: markup.note(sentence),
                    **view.fill(session, Shown(progress.trace, table, settings.method)),
                }
        except (UserError, torch.OutOfMemoryError) as error:
            yield {self.status: failed(error), **view.blank()}
