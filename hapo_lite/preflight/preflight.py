"""One preflight: prints the memory table of a recipe and the settings that fit."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from hapo_lite.errors import UserError
from hapo_lite.model.load import find_origin
from hapo_lite.model.start import starting_adapter
from hapo_lite.preflight.advise import Advice, advise, usable, write_back
from hapo_lite.preflight.measure import measure_loop, prepare
from hapo_lite.preflight.table import memory_table, suggestion, verdict
from hapo_lite.recipe import Recipe
from hapo_lite.train.accelerator import unseen_gpu
from hapo_lite.train.memory.predict import Predictor, predicting, worst_case


def preflight(recipe: Recipe, card: int | None, shape_only: bool, file: Path | None) -> Advice | None:
    """Print the memory of `recipe` and the settings that fit `card` bytes, and write those into `file`.

    card: None takes this machine's GPU or, to measure without a GPU, its main memory. A prediction without a GPU and
    without a card ends with the table, and returns None. shape_only: predict only; without a GPU, for one with bf16.
    Raises UserError if nothing fits, if `file` is given without a card, or if it cannot be edited.
    """
    if card is None:
        card = memory_to_fit(shape_only)
    if card is None and file is not None:
        raise UserError("--write needs to know what to fit: say --card GIB, or run it where the card is")
    predictor = make_predictor(recipe, shape_only)
    print(describe(recipe, predictor))
    if recipe.model.adapter is not None:
        print(f"it goes on from the adapter {starting_adapter(recipe.model, find_origin(recipe.model))}")
    unseen = unseen_gpu()
    if unseen is not None and not shape_only:
        print(f"note: {unseen}")
    if recipe.rollout.engine != "transformers":
        print(f"note: the rollout is predicted for rollout.engine=transformers, not for {recipe.rollout.engine}")
    room = psutil.virtual_memory().available if predictor.device == "cpu" else usable(card or 0)
    stages = predictor.stages(room=room)
    measured = None if shape_only else measure_loop(prepare(recipe), print)
    print(memory_table(stages, measured))
    if measured is not None and measured.fitted:
        print("memory ran out; settings that fitted: " + " ".join(f"{k}={v}" for k, v in measured.fitted.items()))
    if card is None:
        return None
    print(verdict(stages, measured, card))
    factors = {}
    if measured is not None and not measured.fitted:
        factors = {stage.name: measured.allocated[stage.name] / stage.total for stage in stages}
    with predicting(recipe.model.name):
        advice = advise(predictor, recipe, card, factors)
    print(suggestion(advice, recipe))
    if file is not None:
        write_back(file, advice.settings())
        print(f"written to {file}")
    return advice


def memory_to_fit(shape_only: bool) -> int | None:
    """Bytes of this machine's GPU or, to measure without a GPU, of its main memory; None to predict without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return None if shape_only else psutil.virtual_memory().total


def make_predictor(recipe: Recipe, shape_only: bool) -> Predictor:
    """The predictor for this machine; to predict without a GPU, for a GPU with bf16."""
    if torch.cuda.is_available():
        return Predictor(recipe, "cuda")
    if shape_only:
        return Predictor(recipe, "cuda", dtype_of_a_gpu(recipe))
    return Predictor(recipe, "cpu")


def describe(recipe: Recipe, predictor: Predictor) -> str:
    """The first line of a preflight: the model, its dtype, and the sizes of the worst case."""
    sizes = worst_case(recipe, predictor.context)
    return (
        f"{recipe.name}: {recipe.model.name}, {recipe.model.quantization}, computing in "
        f"{str(predictor.dtype).removeprefix('torch.')}; {sizes.rows} completions sampled at once, prompts of "
        f"{sizes.prompt} and completions of {sizes.completion} tokens, micro-batches of {sizes.batch} x {sizes.width}"
    )


def dtype_of_a_gpu(recipe: Recipe) -> torch.dtype:
    """The dtype that the recipe computes in on a card that has bf16."""
    return {"fp16": torch.float16, "fp32": torch.float32}.get(recipe.model.dtype, torch.bfloat16)
