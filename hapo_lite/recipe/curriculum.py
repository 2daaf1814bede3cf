"""The section `data` as training reads it: which prompts it takes, in which order, and which of them rest."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from hapo_lite.recipe.sections import DataSettings, HomePath
from hapo_lite.recipe.settings import Positive, Section

Share = Annotated[float, Field(ge=0, le=1)]


class PassRateSettings(Section):
    """Pass rates that were measured before the run, and the prompts that it trains on because of them."""

    file: HomePath = Field(
        description="Pass rates of the prompts, which python -m hapo_lite.probe has written: "
        "runs/NAME/probe/pass_rates.jsonl"
    )
    between: tuple[Share, Share] = Field(
        (0.1, 0.9), description="Train on the prompts whose pass rate lies between these two, both included"
    )

    @field_validator("between")
    @classmethod
    def _is_in_order(cls, between: tuple[float, float]) -> tuple[float, float]:
        if between[0] > between[1]:
            raise ValueError(f"the lower bound comes first: [{between[1]:g}, {between[0]:g}]")
        return between


class RestSettings(Section):
    """Prompts that are solved every time, and so have nothing to teach, rest for a while."""

    solved: Positive | None = Field(
        None, description="Groups of a prompt, one after another, that are right throughout before it rests; null: none"
    )
    iterations: Positive = Field(10, description="Iterations for which such a prompt rests")


class TrainingDataSettings(DataSettings):
    """Where the problems of a run come from, and which of them each iteration takes."""

    pass_rate: PassRateSettings | None = Field(
        None, description="Measured pass rates, by which prompts are chosen; null: all prompts are trained on"
    )
    curriculum: Literal["none", "easy_first", "match"] = Field(
        "none",
        description="none: a new random order every epoch; easy_first: from high to low pass rates; match: prompts "
        "whose pass rate is near one half are drawn more often",
    )
    rest: RestSettings = Field(default_factory=RestSettings, description="Prompts that rest")

    @property
    def remembers(self) -> bool:
        """Whether a run keeps what its own completions have shown of each prompt."""
        return self.curriculum == "match" or self.rest.solved is not None
