"""A small random model of any causal family of transformers, with the bundled tokenizer.

The family's own defaults stay, so that its layers are those of the real models. What sets a size is made small.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures.changes import CHANGES, SIZES
from hapo_lite.model.origins import TINY_MODEL

LARGEST = 12_000_000
"""Parameters of a small model, at most. A larger one has a size that `SIZES` does not know."""
CHECKPOINT = re.compile(r'checkpoint="([^"]+)"')


def families() -> list[str]:
    """The types of models that transformers has a causal language model for, in its order.

    A type whose configuration is another type's is left out: its models are saved under the other's name.
    """
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if CONFIG_MAPPING[name].model_type == name]


def example_of(family: str) -> str:
    """A real model of the family: the one that transformers documents its configuration with; "" if it names none."""
    found = CHECKPOINT.search(inspect.getsource(CONFIG_MAPPING[family]))
    return found[1] if found else ""


def small_config(kind: type[PretrainedConfig], changes: Mapping[str, Any]) -> PretrainedConfig:
    """A configuration of the class with small sizes. changes: what the class needs besides, by field.

    A mapping in `changes` under the name of a part is for that part's configuration.
    """
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    # A field without a default number follows from others.
    values: dict[str, Any] = {
        name: SIZES[name]
        for name, default in fields.items()
        if name in SIZES and isinstance(default, (int, float)) and not isinstance(default, bool)
    }
    given = ("bos_token_id", "eos_token_id", "pad_token_id", "final_logit_softcapping")
    values |= {name: SIZES[name] for name in given if name in fields}
    if "kv_lora_rank" in fields:  # a head of keys for each head of queries
        values["num_key_value_heads"] = values["num_attention_heads"]
    # One layer of each kind that the family has, and two at least.
    kinds = list(dict.fromkeys(getattr(default_of(kind), "layer_types", None) or ()))
    if "layer_types" in fields and len(kinds) > 1:
        values |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    for part in kind.sub_configs:
        default = getattr(default_of(kind), part, None)
        if isinstance(default, PretrainedConfig):
            values[part] = small_config(type(default), changes.get(part, {}))
    return kind(**values | {name: value for name, value in changes.items() if name not in kind.sub_configs})


def default_of(kind: type[PretrainedConfig]) -> PretrainedConfig | None:
    """The class's default configuration; None if it has none."""
    try:
        return kind()
    except Exception:
        return None


def save_small_model(family: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of the family into `folder`, with the bundled tokenizer.

    Raises ValueError if the model is not small, and what transformers raises if it cannot be made.
    """
    config = small_config(CONFIG_MAPPING[family], CHANGES.get(family, {}))
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > LARGEST:
        raise ValueError(
            f"{size:,} parameters are not a small model: add its sizes to benchmarks/architectures/changes.py"
        )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config.save_pretrained(folder)  # that of the whole model, of which some classes write their part alone
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    tokenizer.model_max_length = SIZES["max_position_embeddings"]
    tokenizer.save_pretrained(folder)
