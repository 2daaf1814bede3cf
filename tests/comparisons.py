"""A comparison of two arms that is over in seconds."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.conftest import TINY

ABOUT = "<script>alert('1')</script> & <b>bold</b>"
FIELDS = {
    "name": "pair",
    "about": ABOUT,
    "recipe": str(TINY),
    "settings": {
        "rollout": {"prompts_per_iteration": 4, "completions_per_prompt": 4},
        "training.updates_per_iteration": 2,
        "evaluation": {"every": 2, "prompts": 4, "samples": 2},
        "checkpoint.every": 2,
        "reward.workers": 1,
        "logging.traces_per_iteration": 0,
    },
    "arms": {"dapo": {"method": "dapo"}, "hapo": {"method": "hapo", "method.tau": 0.5}},
    "seeds": [0, 1],
    "tokens": 1000,
    "threshold": 0.3,
}


def write_comparison(folder: Path, **changes) -> Path:
    """Path of a comparison file in the folder, which has the runs too; a field that is None is left out."""
    fields = {k: v for k, v in (FIELDS | {"output_dir": str(folder / "runs")} | changes).items() if v is not None}
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path
