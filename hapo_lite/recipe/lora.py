"""The section on the adapter."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from hapo_lite.recipe.settings import Positive, Section


class LoraSettings(Section):
    """The adapter that is trained."""

    rank: Positive = Field(32, description="Rank of the adapter matrices")
    alpha: Annotated[float, Field(gt=0)] = Field(
        64.0, description="Scale: the adapter's output is multiplied by alpha / rank, in rslora by alpha / sqrt(rank)"
    )
    variant: Literal["lora", "rslora", "dora"] = Field(
        "lora",
        description="lora; rslora: a scale for high ranks; dora: with a trained magnitude for each output of a layer",
    )
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Layers to adapt: all-linear (all but the head), or a list of module names"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _names_are_a_list(cls, targets: Any) -> Any:
        """Names in a text are a list of names. A text that cannot be names is a pattern, which peft takes."""
        if not isinstance(targets, (str, list, tuple)):
            raise ValueError("must be all-linear, or a list of module names")
        if isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"[\w., ]+", targets):
            return [name for name in re.split(r"[, ]+", targets) if name]
        return targets
