"""The boxes for a generation: the problem, the model with its method, and the limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from hapo_lite.algo.methods import PRESETS
from hapo_lite.errors import UserError
from hapo_lite.inspect.generate import MOST_SECONDS, MOST_TOKENS, GenerationSettings
from hapo_lite.inspect.runs import Run
from hapo_lite.inspect.tabs.state import FIRST_PASS, FROM_RUN, NO_PROGRESS, AppState, latest_signal
from hapo_lite.model.policy import Policy
from hapo_lite.tiny.task import problems

Values = dict[Any, Any]
"""The argument of an event whose inputs are a set: each component with its content."""


def problem_box() -> gr.Dropdown:
    """The box for the problem, with examples."""
    examples = [p.prompt for p in problems("test")[:8]]
    return gr.Dropdown(examples, value=examples[0], label="Problem", allow_custom_value=True, scale=1)


class LimitBoxes:
    """The boxes for the token limit, the seed, the time limit and the system prompt. view: begins their ids."""

    def __init__(self, app: AppState, view: str) -> None:
        with gr.Row():
            self.tokens = gr.Number(256, label="Max tokens", precision=0, minimum=1, maximum=MOST_TOKENS)
            self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{view}-seed")
            self.seconds = gr.Number(120, label="Time limit, s", minimum=1, maximum=MOST_SECONDS)
        self.system_prompt = gr.Textbox(app.start().system_prompt, label="System prompt", info="empty: none")
        self.inputs: set[Any] = {self.tokens, self.seed, self.seconds, self.system_prompt}


class ModelBoxes:
    """The boxes for the model and the method. A run that a reader picks fills them with its settings.

    side: begins the ids of the boxes. preset: the method at first; "": that of the page's defaults.
    open_all: whether all boxes are unfolded at first.
    """

    def __init__(self, app: AppState, side: str, limits: LimitBoxes, preset: str = "", open_all: bool = True) -> None:
        self.app = app
        start = app.start()
        with gr.Row():
            self.run = gr.Dropdown(
                ["", *app.runs()],
                value="" if app.model or app.adapter else app.first_run,
                label="As in run",
                info="fills the boxes",
                elem_id=f"{side}-run",
            )
            self.method = gr.Dropdown(
                list(PRESETS),
                value=preset or start.method.preset,
                label="Method",
                info="dapo: without HAPO",
                elem_id=f"{side}-method",
            )
        with gr.Accordion("Model, signal and temperature", open=open_all):
            with gr.Row():
                self.model = gr.Textbox(
                    start.model, label="Model", info="tiny (bundled), a hub name or a folder", elem_id=f"{side}-model"
                )
                self.adapter = gr.Dropdown(
                    app.adapters(),
                    value=start.adapter,
                    label="Adapter",
                    info="runs/NAME/adapter; empty: none",
                    allow_custom_value=True,
                    elem_id=f"{side}-adapter",
                )
            with gr.Row():
                self.quantization = gr.Radio(
                    ["none", "nf4"], value=start.quantization, label="Quantisation", info="nf4: 4-bit base"
                )
                self.signal = gr.Radio(
                    [FIRST_PASS, FROM_RUN],
                    value=FIRST_PASS,
                    label="Signal",
                    info="the tokens that h compares with (Eq. 5)",
                )
            with gr.Row():
                self.temperature = gr.Slider(
                    0.05, 2.5, start.temperature, step=0.05, label="Temperature", info="T_base (Eq. 8)", min_width=210
                )
                self.tau = gr.Slider(
                    0.0,
                    0.9,
                    start.method.tau,
                    step=0.01,
                    label="tau",
                    info="how far the temperature moves (Eq. 8)",
                    min_width=210,
                    elem_id=f"{side}-tau",
                )
                self.rho = gr.Slider(
                    0.0,
                    1.0,
                    start.method.quantile,
                    step=0.01,
                    label="rho",
                    info="quantile of the pivot (Eq. 5)",
                    min_width=210,
                )
        filled = [self.method, self.model, self.adapter, self.quantization, self.temperature, self.tau, self.rho]
        self.inputs: set[Any] = {self.run, self.signal, *filled}
        self.run.input(self._fill, self.run, [*filled, limits.system_prompt], **NO_PROGRESS)

    def _fill(self, run: str) -> list[Any]:
        """The settings of a run, in the order of the boxes that its choice fills."""
        try:
            defaults = self.app.defaults(run)
        except UserError as error:
            raise gr.Error(str(error)) from None
        return [
            defaults.method.preset,
            defaults.model,
            defaults.adapter,
            defaults.quantization,
            defaults.temperature,
            defaults.method.tau,
            defaults.method.quantile,
            defaults.system_prompt,
        ]

    def policy(self, values: Values) -> Policy:
        """The model that the boxes name. It is loaded unless it is held already. Raises UserError."""
        return self.loader(values)()

    def loader(self, values: Values) -> Callable[[], Policy]:
        """What gives the model that the boxes name. While it is that of the picked run, prompts are rendered as in that
        run. Raises UserError if the run is none."""
        run = self._run(values)
        model = run.recipe.model if run and run.recipe else None
        adapter, quantization = values[self.adapter] or "", values[self.quantization]
        return partial(self.app.shelf.get, values[self.model], adapter, quantization, model)

    def _run(self, values: Values) -> Run | None:
        """The run that is picked. Raises UserError if it is not a run."""
        return self.app.run(values[self.run]) if values[self.run] else None

    def settings(self, values: Values, problem: str | None, limits: LimitBoxes) -> GenerationSettings:
        """The settings in the boxes. The constants of a run's method hold while that method is chosen.

        Raises UserError for a value that is out of range, or if the run has no signal.
        """
        run = self._run(values)
        method = PRESETS[values[self.method]]
        if run and run.recipe and run.recipe.method.preset == method.preset:
            method = run.recipe.method
        signal = None
        if values[self.signal] == FROM_RUN:
            if run is None:
                raise UserError(f"no run is picked: pick one, or set the signal to {FIRST_PASS}")
            signal = latest_signal(run)
        return GenerationSettings(
            problem=problem or "",
            method=replace(method, tau=values[self.tau], quantile=values[self.rho]),
            temperature=values[self.temperature],
            max_new_tokens=int(values[limits.tokens] or 0),
            seed=int(values[limits.seed] or 0),
            seconds=values[limits.seconds] or 0.0,
            signal=signal,
            system_prompt=_system_prompt(values[limits.system_prompt], run),
        )


def _system_prompt(text: str, run: Run | None) -> str | None:
    """The system prompt of a box. An empty box stands for no system message, or for that of the run if it is empty."""
    if text.strip():
        return text
    own = run.recipe.data.system_prompt if run and run.recipe else None
    return own if own is not None and not own.strip() else None
