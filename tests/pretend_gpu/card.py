"""A pretended card for torch, accelerate and transformers to find, and models that are moved to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from hapo_lite.head import tiles
from hapo_lite.head import triton as head_triton
from hapo_lite.model.policy import Policy
from tests.pretend_gpu.device import Pretended, count_kernel, note, plain

MEMORY = 24 * 2**30
"""Bytes of the pretended card."""


class _Stream:
    """A stream, or an event, of a card on which everything is done at once."""

    def __init__(self, *_, **__) -> None:
        pass

    def synchronize(self) -> None:
        note("synchronize")

    def wait_stream(self, other) -> None: ...
    def wait_event(self, event) -> None: ...
    def record(self, stream=None) -> None: ...
    def record_event(self, event=None) -> None: ...


def _known_to_torch() -> dict[str, object]:
    """What torch.cuda answers where there is an Ampere card. Unset memory statistics are 0."""
    properties = SimpleNamespace(name="pretended", major=8, minor=6, total_memory=MEMORY, multi_processor_count=28)
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (MEMORY, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: note("synchronize"),
        "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Stream,
        "_lazy_init": lambda: None,
    }


class _Launches:
    """A kernel of Triton for tensors of the pretended card: Triton's interpreter runs it on their data."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            count_kernel("triton")
            self.kernel[grid](*plain(arguments), **options)

        return launch


@contextlib.contextmanager
def found_by_torch() -> Iterator[None]:
    """A context within which torch finds a card, and the head finds no Triton."""
    with (
        mock.patch.multiple(torch.cuda, **_known_to_torch()),
        mock.patch.object(
            import_module("torch.optim.optimizer"), "_foreach_supported_types", [Tensor, nn.Parameter, Pretended]
        ),
        mock.patch.object(torch.utils._foreach_utils, "_foreach_supported_types", [Tensor, Pretended]),
        mock.patch.object(tiles, "fold_kernel", lambda device: None),
    ):
        yield


@contextlib.contextmanager
def found_by_triton() -> Iterator[None]:
    """A context within which the head uses Triton's kernel, which takes seconds in Triton's interpreter."""
    with (
        mock.patch.object(head_triton, "_fold", _Launches(head_triton._fold)),
        mock.patch.object(tiles, "fold_kernel", lambda device: head_triton.fold),
    ):
        yield


def on_card(policy: Policy) -> Policy:
    """The policy with every parameter and buffer on the pretended card, those of packed weights too."""
    move(policy.model)
    return policy


def move(model: nn.Module) -> None:
    """Put a model's parameters and buffers on the pretended card. What modules share stays shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the original, so that no id is given twice
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and not isinstance(tensor, Pretended):
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor, _moved(tensor)
                    held[name] = made[id(tensor)][1]


def _moved(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = Pretended(tensor.detach().as_subclass(Tensor))
    if not isinstance(tensor, nn.Parameter):
        return found
    found = nn.Parameter(found, requires_grad=tensor.requires_grad)
    # A packed weight of bitsandbytes has its scales in a state, and the state of the scales in another.
    for name, value in vars(tensor).items():
        setattr(found, name, value)
    state = getattr(tensor, "quant_state", None)
    for part in filter(None, (state, getattr(state, "state2", None))):
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not isinstance(value, Pretended):
                setattr(part, name, Pretended(value))
    return found
