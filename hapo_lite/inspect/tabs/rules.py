"""The tab Rules: one rule against another on the recorded completions of a run's iteration."""

from __future__ import annotations

from typing import NamedTuple

import gradio as gr

from hapo_lite.errors import UserError
from hapo_lite.inspect import rules_view
from hapo_lite.inspect.rules import AS_IN_RUN, REPLAYABLE, RuleComparison, choose_rule, compare_rules, updated
from hapo_lite.inspect.runs import Run
from hapo_lite.inspect.tabs.controls import Values
from hapo_lite.inspect.tabs.run_place import nearest
from hapo_lite.inspect.tabs.state import NO_PROGRESS, QUIET, AppState, error_note, explain
from hapo_lite.inspect.tabs.view import Update
from hapo_lite.runs.trace import Trace


class Compared(NamedTuple):
    """The two rules on an iteration's traces. number: of the iteration."""

    run: Run
    number: int
    traces: list[Trace]
    found: RuleComparison


class RulesTab:
    """The tab with its events."""

    def __init__(self, app: AppState) -> None:
        self.app = app
        explain(
            "What two rules do with the tokens of a recorded iteration, at the ratios that its updates met (Eq. 9-13). "
            "The advantage of each completion is the recorded one under both."
        )
        with gr.Row():
            self.run = gr.Dropdown(app.runs(), value=app.first_run or None, label="Run", elem_id="rules-run")
            self.iteration = gr.Number(
                0, label="Iteration (0: the last)", precision=0, minimum=0, elem_id="rules-iteration"
            )
            rules = [AS_IN_RUN, *REPLAYABLE]
            self.left = gr.Dropdown(rules, value=AS_IN_RUN, label="Rule", elem_id="rules-left")
            self.right = gr.Dropdown(rules, value="dapo", label="against", elem_id="rules-right")
        with gr.Row(elem_classes="hapo-actions"):
            start = gr.Button("Compare rules", variant="primary", elem_id="rules-start")
        self.result = gr.HTML(elem_id="rules-result")
        self.completion = gr.Dropdown([], label="Completion", visible=False, elem_id="rules-completion")
        with gr.Row():
            with gr.Column(min_width=320):
                self.left_text = gr.HTML(elem_id="rules-left-text")
            with gr.Column(min_width=320):
                self.right_text = gr.HTML(elem_id="rules-right-text")
        chosen = {self.run, self.iteration, self.left, self.right}
        texts = [self.left_text, self.right_text]
        everything = [self.result, self.completion, *texts]
        gr.on(
            [start.click, self.left.input, self.right.input], self.show, chosen, everything, api_name="rules", **QUIET
        )
        self.completion.input(self.show_completion, {*chosen, self.completion}, texts, **NO_PROGRESS)

    def compare(self, values: Values) -> Compared:
        """The comparison that the boxes ask for. Raises UserError if there is nothing to compare."""
        if not values[self.run]:
            raise UserError(f"no run is open: pick one of {self.app.root}, or start with --run runs/NAME")
        run = self.app.run(values[self.run])
        number = nearest(run, int(values[self.iteration] or max(run.iterations(), default=0)))
        traces = updated(run.traces(number)[0])
        own = run.settings.method
        left, right = (choose_rule(values[box], own) for box in (self.left, self.right))
        return Compared(run, number, traces, compare_rules(traces, left, right))

    def show(self, values: Values) -> Update:
        """The iteration in sum, and its first completion."""
        hidden = gr.Dropdown(choices=[], value=None, visible=False)
        try:
            compared = self.compare(values)
        except UserError as error:
            return {self.result: error_note(error), self.completion: hidden, self.left_text: "", self.right_text: ""}
        names = self._names(values, compared.run)
        choices = [(f"{t.prompt_id[:80]} · {t.sample} · {t.outcome[:40]}", i) for i, t in enumerate(compared.traces)]
        label = f"Completion of iteration {compared.number}"
        return {
            self.result: rules_view.comparison_html(compared.found, names, len(compared.traces)),
            self.completion: gr.Dropdown(choices=choices, value=0, label=label, visible=True),
            **self._texts(compared, 0, names),
        }

    def show_completion(self, values: Values) -> Update:
        """One completion under both rules."""
        try:
            compared = self.compare(values)
            return self._texts(compared, int(values[self.completion] or 0), self._names(values, compared.run))
        except UserError as error:
            return {self.left_text: error_note(error), self.right_text: ""}

    def _names(self, values: Values, run: Run) -> tuple[str, str]:
        own = f"{run.settings.method.preset} (this run)"
        left, right = (own if values[box] == AS_IN_RUN else values[box] for box in (self.left, self.right))
        return left, right

    def _texts(self, compared: Compared, place: int, names: tuple[str, str]) -> Update:
        if place >= len(compared.traces):
            raise UserError(f"iteration {compared.number} has {len(compared.traces)} completions: compare again")
        table = compared.run.table(compared.traces[place])
        left, right = compared.found.left[place], compared.found.right[place]
        return {
            self.left_text: rules_view.text_html(table, left, right, names[0]),
            self.right_text: rules_view.text_html(table, right, left, names[1]),
        }
