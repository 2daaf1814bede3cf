"""One preflight, from a recipe to its table and its advice."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from hapo_lite.errors import UserError
from hapo_lite.preflight.advise import Advice, advise, usable, write_back
from hapo_lite.preflight.measure import measure_loop, prepare
from hapo_lite.preflight.table import memory_table, suggestion, verdict
from hapo_lite.recipe import Recipe
from hapo_lite.train.memory.predict import Predictor, worst_case


def preflight(recipe: Recipe, card: int | None, shape_only: bool, file: Path | None) -> Advice | None:
    """Print what `recipe` takes and what fits `card` bytes, and write that into `file`.

    card: None: this machine's GPU or, when measuring without one, its memory; a prediction without a GPU then ends
    with the table. shape_only: for a GPU, whatever this machine has.
    """
    cuda = torch.cuda.is_available()
    if card is None and cuda:
        card = torch.cuda.get_device_properties(0).total_memory
    if card is None and not shape_only:
        card = psutil.virtual_memory().total
    if card is None and file is not None:
        raise UserError("--write needs to know what to fit: say --card GIB, or run it where the card is")
    if shape_only and not cuda:
        predictor = Predictor(recipe, "cuda", dtype_of_a_gpu(recipe))
    else:
        predictor = Predictor(recipe, "cuda" if cuda else "cpu")
    sizes = worst_case(recipe, predictor.context)
    print(
        f"{recipe.name}: {recipe.model.name}, {recipe.model.quantization}, computing in "
        f"{str(predictor.dtype).removeprefix('torch.')}; {sizes.rows} completions sampled at once, prompts of "
        f"{sizes.prompt} and completions of {sizes.completion} tokens, micro-batches of {sizes.batch} x {sizes.width}"
    )
    if recipe.rollout.engine != "transformers":
        print(f"note: the rollout is predicted for rollout.engine=transformers, not for {recipe.rollout.engine}")
    room = psutil.virtual_memory().available if predictor.device == "cpu" else usable(card or 0)
    stages = predictor.stages(room=room)
    measured = None if shape_only else measure_loop(prepare(recipe), print)
    print(memory_table(stages, measured))
    if measured is not None and measured.fitted:
        print("memory ran out; what fitted: " + " ".join(f"{k}={v}" for k, v in measured.fitted.items()))
    if card is None:
        return None
    print(verdict(stages, measured, card))
    factors = {}
    if measured is not None and not measured.fitted:
        factors = {stage.name: measured.allocated[stage.name] / stage.total for stage in stages}
    advice = advise(predictor, recipe, card, factors)
    print(suggestion(advice, recipe))
    if file is not None:
        write_back(file, advice.settings())
        print(f"written to {file}")
    return advice


def dtype_of_a_gpu(recipe: Recipe) -> torch.dtype:
    """What the recipe computes in on a card that has bf16."""
    return {"fp16": torch.float16, "fp32": torch.float32}.get(recipe.model.dtype, torch.bfloat16)
