"""The tab Compare: two settings on one prompt with the same random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr
import torch

from hapo_lite.errors import UserError
from hapo_lite.inspect import markup, views
from hapo_lite.inspect.tabs.controls import LimitBoxes, ModelBoxes, Values, problem_box
from hapo_lite.inspect.tabs.example import Example
from hapo_lite.inspect.tabs.state import NO_PROGRESS, ONE_AT_A_TIME, AppState, Session, arm, error_note, explain, stop
from hapo_lite.inspect.tabs.stream import snapshots
from hapo_lite.inspect.tabs.view import TokensView, Update
from hapo_lite.inspect.views import Shown

SIDES = ("left", "right")


class CompareTab:
    """The tab with its events. example: the recorded group, one completion of which it opens with."""

    def __init__(self, app: AppState, session: gr.State, example: Example) -> None:
        self.app = app
        self.example = example
        self.session = session
        explain(
            "Two settings answer one prompt with the same random numbers. Underlined tokens have no counterpart on the "
            "other side (Eq. 5-8)."
        )
        with gr.Row(elem_classes="hapo-ask"):
            self.problem = problem_box()
            start = gr.Button("Compare", variant="primary", elem_id="compare", scale=0, min_width=130)
            cancel = gr.Button("Cancel", scale=0, min_width=110)
        with gr.Row():
            columns = [gr.Column(min_width=300) for _ in SIDES]
        with gr.Accordion("Limits and system prompt", open=False):
            self.limits = LimitBoxes(app, "compare")
        self.boxes = []
        for side, column, preset in zip(SIDES, columns, ("", "dapo"), strict=True):
            with column:
                gr.HTML(f'<h3 class="hapo-h">{side.capitalize()}</h3>')
                self.boxes.append(ModelBoxes(app, side, self.limits, preset, open_all=False))
        self.status = gr.HTML(elem_id="compare-status")
        self.views = []
        with gr.Row():
            for side in SIDES:
                with gr.Column(min_width=320):
                    self.views.append(TokensView(app, side, session))
        self.figures = gr.HTML(elem_id="compare-figures")
        self.curves = gr.HTML(elem_id="compare-curves")
        inputs = {session, self.problem, *self.limits.inputs}.union(*(boxes.inputs for boxes in self.boxes))
        self.outputs = [self.status, *self.views[0].outputs, *self.views[1].outputs, self.figures, self.curves]
        start.click(arm, session, None, queue=False).then(self.stream, inputs, self.outputs, **ONE_AT_A_TIME)
        cancel.click(stop, session, None, queue=False)

    def fill_when_opened(self, tab: gr.Tab) -> None:
        """Fill the tab when a reader opens it, so that the opening of the page does not wait for it."""
        tab.select(self.open, self.session, self.outputs, **NO_PROGRESS)

    def open(self, session: Session) -> Update:
        """A recorded completion under HAPO and under DAPO, unless the tab shows a comparison."""
        if session.shown.keys() & set(SIDES):
            return {self.status: gr.skip()}
        left, right = self.example.against_dapo()
        session.shown |= {"left": left, "right": right}
        sentence = (
            f"Recorded: one answer of the bundled model to {left.trace.messages[-1][1]}, on the left as HAPO treats "
            "its tokens, on the right as DAPO does. Colour by temperature, bounds or advantage weight to see where "
            "they differ. Press Compare, and each side writes an answer of its own."
        )
        return self._filled(left, right) | {self.status: markup.note(sentence, "reading")}

    def stream(self, values: Values) -> Iterator[Update]:
        """The tab while the two sides are written, one after the other, and at the end the whole comparison."""
        session = values[self.session]
        nothing: Update = {self.figures: "", self.curves: ""}
        for view in self.views:
            nothing |= view.blank()
        try:
            yield {self.status: markup.note("Loading the model."), **nothing}
            for side, boxes, view in zip(SIDES, self.boxes, self.views, strict=True):
                settings = boxes.settings(values, values[self.problem], self.limits)
                policy = boxes.policy(values)
                for snapshot in snapshots(policy, settings, session):
                    if session.cancel:
                        raise UserError("Cancelled.")
                    status = f"Writing the {side} side: {len(snapshot.table):,} tokens."
                    yield {self.status: markup.note(status), **view.streaming(snapshot.table)}
                    if snapshot.ended:
                        session.shown[side] = Shown(snapshot.trace, snapshot.table, settings.method)
            yield self.fill(values, session.shown["left"], session.shown["right"])
        except (UserError, torch.OutOfMemoryError) as error:
            yield {self.status: error_note(error), **nothing}

    def fill(self, values: Values, left: Shown, right: Shown) -> Update:
        """The whole comparison, with the curves of the two runs if the sides have different ones."""
        update = self._filled(left, right)
        one, other = (values[boxes.run] for boxes in self.boxes)
        if one and other and one != other:
            update[self.curves] = views.curves(self.app.run(one), self.app.run(other))[0]
        return update

    def _filled(self, left: Shown, right: Shown) -> Update:
        """Both sides with their differences marked, the sentence on them, the figures, and no curves of runs."""
        comparison = views.comparison(left, right, csv=[view.download for view in self.views])
        update: Update = {self.status: comparison.sentence, self.figures: comparison.figures, self.curves: ""}
        for view, (summary, tokens) in zip(self.views, comparison.sides, strict=True):
            update |= {view.summary: summary, view.tokens: tokens}
        return update
