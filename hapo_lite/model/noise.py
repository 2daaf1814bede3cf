"""Switches off what a base model does at random in training mode.

Training needs the ratio of new to old probability to be 1 before the first update, so a forward pass in training mode
has to give what one in evaluation mode gives.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

RANDOM = re.compile(r"(drop|jitter)", re.IGNORECASE)
"""In the name of each number that sets a probability of dropout, or the width of noise: attention_dropout, resid_pdrop,
layerdrop, router_jitter_noise."""


def switch_off_noise(model: nn.Module) -> None:
    """Set every dropout and every jitter of a model to 0: its dropout layers, and the numbers that its layers keep."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and RANDOM.search(name):
                setattr(module, name, 0.0)
    # Some layers read the config in every forward.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    for config in configs.values():
        for name, value in vars(config).items():
            if isinstance(value, float) and RANDOM.search(name):
                setattr(config, name, 0.0)
