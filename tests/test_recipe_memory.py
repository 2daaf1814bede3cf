"""The memory that a recipe's first lines promise is what preflight predicts for the true shapes."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import Qwen3Config

from benchmarks.shapes import QWEN_1_5B, QWEN_7B
from hapo_lite.preflight.preflight import dtype_of_a_gpu
from hapo_lite.recipe import load_recipe
from hapo_lite.train.memory.predict import Predictor
from tests.conftest import ROOT

GIB = 2**30
ALONE = re.compile(r"# Predicted peak memory: rollout ([\d.]+), scoring ([\d.]+), update ([\d.]+) GiB\b")
BESIDE = re.compile(
    r"# Predicted peak memory: rollout ([\d.]+) with an unpacked copy of the base, ([\d.]+) without; scoring ([\d.]+), "
    r"update ([\d.]+) GiB\b"
)
CONFIGS = {
    "Qwen/Qwen2.5-Math-1.5B": QWEN_1_5B.config(),
    "Qwen/Qwen2.5-Math-7B": QWEN_7B.config(),
    # The fields that differ from Qwen3Config's own, in the hub's config.json.
    "Qwen/Qwen3-8B": Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
    ),
}
PROMISING = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "Predicted peak memory" in path.read_text()]


def test_every_recipe_for_a_card_promises_something():
    assert len(PROMISING) == 6


@pytest.mark.slow
@pytest.mark.parametrize("path", PROMISING, ids=lambda path: path.stem)
def test_the_figures_of_a_recipes_first_lines_are_those_of_the_prediction(path, tmp_path, monkeypatch):
    """To the digits that are given."""
    written = load_recipe(path)
    CONFIGS[written.model.name].save_pretrained(tmp_path)
    recipe = load_recipe(path, [f"model.name={tmp_path}"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as without a card, on a machine that has one
    predictor = Predictor(recipe, "cuda", dtype_of_a_gpu(recipe))
    rollout, scoring, update = (stage.total for stage in predictor.stages())
    head = path.read_text(encoding="utf-8")
    if beside := BESIDE.search(head):
        figures = beside.groups()
        predicted = [rollout + predictor.unpacked, rollout, scoring, update]
    else:
        figures = ALONE.search(head).groups()
        predicted = [rollout, scoring, update]
    assert [
        f"{size / GIB:.{len(figure.partition('.')[2])}f}" for size, figure in zip(predicted, figures, strict=True)
    ] == [*figures]
