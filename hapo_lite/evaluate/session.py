"""What a command has that samples without training: its processes, its display, the model, the engine, the grader."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from hapo_lite.errors import writing
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.rollout.engine import make_engine
from hapo_lite.runs.display import Display
from hapo_lite.runs.folder import RunFolder, check_place, with_date_of
from hapo_lite.runs.progress import Progress
from hapo_lite.runs.status import Status
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.train.accelerator import make_accelerator
from hapo_lite.train.collect import Collector
from hapo_lite.train.memory.room import unpacks


@dataclass(frozen=True)
class Session:
    """One command. recipe: with the date of the run's chat template. folder: within the run's, for the results."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    display: Display

    def load(self, adapter: Path | None) -> Policy:
        """Load the base with the adapter of that folder. None: with a new adapter, which changes nothing."""
        recipe, device = self.recipe, self.accelerator.device
        with self.display.progress.within(f"loading {recipe.model.name}, base {recipe.model.quantization}"):
            unpacked = unpacks(recipe, device)
            model = recipe.model.without_adapter()
            return load_policy(model, recipe.seed, device, adapter, recipe.rollout.engine, unpacked)

    def claim(self) -> None:
        """Make the folder, and keep other commands out of it. Raises UserError if one is at work there."""
        if self.accelerator.is_main_process:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self.display.status.claim()

    @contextlib.contextmanager
    def collecting(self, policy: Policy, max_new_tokens: int) -> Iterator[Collector]:
        """What samples and grades. Answers are graded, whatever the recipe's rewards."""
        recipe, progress = self.recipe, self.display.progress
        reward = recipe.reward.model_copy(update={"function": None, "functions": (), "overlong_buffer": 0})
        with Scorer(reward, max_new_tokens) as scorer:
            scorer.opening = policy.opening
            with progress.within(f"rollout.engine = {recipe.rollout.engine}"):
                engine = make_engine(recipe, policy, max_new_tokens)
            collector = Collector(engine, scorer, self.accelerator, progress)
            collector.oom.dense = policy.dense
            yield collector


@contextlib.contextmanager
def session_in(recipe: Recipe, folder: Path) -> Iterator[Session]:
    """A command whose results go to `folder`. Raises UserError if the run's folder holds something else than a run."""
    recipe = with_date_of(RunFolder(recipe.run_dir), recipe)
    # Trackers are for training.
    recipe = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"report_to": "none"})})
    accelerator = make_accelerator(recipe)
    check_place(RunFolder(recipe.run_dir))
    main = accelerator.is_main_process
    with (
        Status(folder / "status.json" if main else None) as status,
        Display(Progress(status.enter), status, main, recipe.logging.progress) as display,
    ):
        yield Session(recipe, folder, accelerator, display)
