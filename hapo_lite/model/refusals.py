"""Sentences for models that transformers cannot load or run."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from hapo_lite.errors import UserError, first_line, page
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.recipe import ModelSettings

MODEL_CODE = re.compile(r"[/\\]transformers[/\\]|transformers_modules")
"""In the path of a file of transformers, or of code that came with a model."""
LIBRARY = re.compile(r"(site|dist)-packages|[/\\]lib[/\\]python|^<")
"""In the path of a file of a library, or of Python's own."""
OURS = Path(__file__).parents[1]
CARD = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS")
"""Parts of the messages of errors that a card, its driver or a library for it raises, in whose code so ever."""
NO_KERNEL = "no kernel image is available"
"""Part of the message for a card that a library was not built for."""


def known_problem(settings: ModelSettings, error: Exception) -> str | None:
    """The sentence for an error that means that a model cannot be loaded with these settings; None for other errors."""
    name, text = settings.name, str(error)
    if "trust_remote_code=True" in text:
        return (
            f"model.name = {name} brings Python code that it needs, which is not run: read it, and set "
            f"model.trust_remote_code=true if it may run on this machine with your rights ({page('security.md')})"
        )
    if "Unrecognized configuration class" in text:
        kind = re.search(r"\.(\w+)Config'", text)
        return (
            f"model.name = {name} is no causal language model: transformers has none of the kind "
            f"{kind[1] if kind else 'that its config.json names'}; choose a model that continues a text"
        )
    if "through torch.nn.functional.scaled_dot_product_attention" in text:
        return no_fused_attention(name)
    if settings.attention == "flash_attention_2" and re.search("flash.?att", text, re.IGNORECASE):
        return (
            f"model.attention = flash_attention_2 cannot be used ({first_line(error)}): set model.attention=sdpa, or "
            "pip install flash-attn where a GPU is"
        )
    return None


def no_fused_attention(name: str) -> str:
    """The sentence for model.attention = sdpa with a model that has only an attention of its own."""
    return f"model.attention = sdpa is not there for {name}: set model.attention=eager"


def no_cache(name: str, model: nn.Module) -> str:
    """The sentence for a model without a cache that can be spread over rows."""
    return (
        f"model.name = {name} cannot be sampled: {type(model).__name__} keeps what it has read in no cache of "
        "transformers' kind; choose another model"
    )


@contextlib.contextmanager
def own_errors(name: str, packed: bool) -> Iterator[None]:
    """A context that turns an error of a model's own code into a UserError.

    name: model.name; packed: whether the base is in 4 bits. Other errors pass, those of a card and a shortage of memory
    among them; a card that a library was not built for is a UserError too.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = place_in_model(error)
        if place is None or is_out_of_memory(error):
            raise
        if NO_KERNEL in str(error):
            raise UserError(
                f"a library here has no code for this card ({place}: {first_line(error)}): install builds of torch, "
                "and of libraries with kernels of their own such as bitsandbytes, that support the card"
            ) from error
        if is_of_card(error):
            raise
        advice = "choose another model or another version of transformers"
        if packed:
            advice = (
                f"if its code multiplies by packed weights itself, model.quantization=none helps, otherwise {advice}"
            )
        raise UserError(
            f"model.name = {name} was loaded, and its own code fails when it runs ({place}: {type(error).__name__}: "
            f"{first_line(error)}); {advice}"
        ) from error


def is_of_card(error: BaseException) -> bool:
    """Whether a card, its driver or a library for it raised the error. The model need not be the cause."""
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in CARD)


def place_in_model(error: BaseException, through_ours: bool = False) -> str | None:
    """The innermost line of a model's code that an error has passed, as `file:line`; None if it has passed none.

    None also if the model's code has called code of this package or of the user, which may then be at fault.
    through_ours: this package's may have been called all the same.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        ours = OURS in Path(frame.filename).parents
        if MODEL_CODE.search(frame.filename):
            return f"{Path(frame.filename).name}:{frame.lineno}"
        if not (ours and through_ours) and (ours or not LIBRARY.search(frame.filename)):
            return None
    return None
