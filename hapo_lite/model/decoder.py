"""How a model is called, and what its head reads. Families of transformers differ in both.

Axes: B sequences, L tokens of a sequence, D hidden.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

STATES = "cache_params"
"""The name under which state-space models take a cache."""
CACHES = ("past_key_values", STATES)


def decoder_of(base: PreTrainedModel) -> nn.Module:
    """The part of a model that turns tokens into hidden states."""
    found = base.get_decoder()
    # Where a model calls its head `decoder`, transformers finds that.
    return found if isinstance(found, PreTrainedModel) else base.base_model


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a module's forward by name; those of the base where an adapter is around it."""
    if isinstance(module, PeftModel):
        module = module.get_base_model()
    return _parameters_of(type(module).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(forward).parameters


def cache_name(module: nn.Module) -> str | None:
    """The name under which a model or its decoder takes a cache; None if it takes none."""
    parameters = _parameters(module)
    # A forward that something has been wrapped around may name nothing and take all.
    if "input_ids" not in parameters:
        return CACHES[0]
    return next((name for name in CACHES if name in parameters), None)


def call(module: nn.Module, cache: Cache | None = None, **inputs: Any) -> Any:
    """Call a model or its decoder with those of the inputs that it takes. cache: read and written if it is given."""
    parameters = _parameters(module)
    if cache is not None and (name := cache_name(module)) is not None:
        inputs |= {name: cache, "use_cache": True}
        if name == STATES and inputs["input_ids"].shape[1] == 1:
            inputs["attention_mask"] = None  # the mask is that of all tokens, which are in the state
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        inputs = {name: value for name, value in inputs.items() if name in parameters}
    return module(**inputs)


def head_input(base: PreTrainedModel, whole: bool, cache: Cache | None = None, **inputs: Any) -> Tensor:
    """What the head reads, [B, L, D].

    whole: whether the whole model is called, since it changes the decoder's output before the head reads it; else the
    decoder alone is called.
    """
    if not whole:
        hidden: Tensor = call(decoder_of(base), cache, **inputs).last_hidden_state
        return hidden
    head, read = vars(base.get_output_embeddings()), []

    def forward(hidden: Tensor) -> Tensor:
        read.append(hidden)
        return hidden[..., :1]  # in place of logits, which nobody reads

    before = head.get("forward")
    head["forward"] = forward
    try:
        call(base, cache, **inputs)
    finally:
        if before is None:
            del head["forward"]
        else:
            head["forward"] = before
    return read[0]
