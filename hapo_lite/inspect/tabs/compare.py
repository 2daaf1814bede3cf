"""Compare: two settings on one prompt with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes, Values, problem_box
from hapo_lite.inspect.tabs.desk import ONE_AT_A_TIME, Desk, Shown, arm, failed, reading, stop
from hapo_lite.inspect.tabs.stream import write
from hapo_lite.inspect.tabs.view import TokensView, Update

SIDES = ("left", "right")


class CompareTab:
    def __init__(self, desk: Desk, session: gr.State) -> None:
        self.desk, self.session = desk, session
        reading(
            "Two settings write on one prompt with the same random numbers; underlined tokens have no counterpart on "
            "the other side (Eq. 5-8)."
        )
        self.problem = problem_box()
        with gr.Row():
            columns = [gr.Column(min_width=300) for _ in SIDES]
        with gr.Accordion("Limits and system prompt", open=False):
            self.limits = LimitBoxes(desk, "compare")
        self.boxes = []
        for side, column, preset in zip(SIDES, columns, ("", "dapo"), strict=True):
            with column:
                gr.HTML(f'<h3 class="hapo-h">{side.capitalize()}</h3>')
                self.boxes.append(ModelBoxes(desk, side, self.limits, preset))
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Compare", variant="primary", elem_id="compare")
            cancel = gr.Button("Cancel")
        self.status = gr.HTML(elem_id="compare-status")
        self.views = []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=320):
                    self.views.append(TokensView(desk, side))
        self.figures = gr.HTML(elem_id="compare-figures")
        self.curves = gr.HTML(elem_id="compare-curves")
        inputs = {session, self.problem, *self.limits.inputs}.union(*(boxes.inputs for boxes in self.boxes))
        outputs = [self.status, *self.views[0].outputs, *self.views[1].outputs, self.figures, self.curves]
        done = start.click(arm, session, None, queue=False).then(self.stream, inputs, outputs, **ONE_AT_A_TIME)
        for view in self.views:
            done = done.then(view.write_csv, session, view.csv, show_progress="hidden")
        cancel.click(stop, session, None, queue=False)

    def stream(self, values: Values) -> Iterator[Update]:
        """The tab while the two sides are written, one after the other, and the whole of it at the end."""
        session = values[self.session]
        nothing: Update = {self.figures: "", self.curves: ""}
        for view in self.views:
            nothing |= view.blank()
        try:
            yield {self.status: markup.note("Loading the model."), **nothing}
            results = []
            for side, boxes, view in zip(SIDES, self.boxes, self.views, strict=True):
                settings = boxes.settings(values, values[self.problem], self.limits)
                policy = boxes.policy(values)
                for progress, table, ended in write(policy, settings, session):
                    if session.cancel:
                        raise UserError("Cancelled.")
                    doing = f"Writing the {side} side: {len(table):,} tokens."
                    yield {self.status: markup.note(doing), **view.streaming(table)}
                    if ended:
                        results.append((progress.trace, table))
                        setattr(session, side, Shown(progress.trace, table, settings.method))
            yield self.fill(values, results)
        except (UserError, torch.OutOfMemoryError) as error:
            yield {self.status: failed(error), **nothing}

    def fill(self, values: Values, results: list) -> Update:
        shown = views.comparison(*results, csv=[view.download for view in self.views])
        update: Update = {self.status: shown.sentence, self.figures: shown.figures, self.curves: ""}
        for view, (summary, tokens) in zip(self.views, shown.sides, strict=True):
            update |= {view.summary: summary, view.tokens: tokens}
        names = [values[boxes.run] for boxes in self.boxes]
        if all(names) and names[0] != names[1]:
            update[self.curves] = views.curves(*(self.desk.run(name) for name in names))[0]
        return update
