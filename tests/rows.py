"""Files of rows, and the prompts that are read from them."""

from __future__ import annotations

import json
from pathlib import Path

from hapo_lite.recipe import DataSettings
from hapo_lite.tasks.data import PromptSet, load_prompts


def load(source: Path | str, **settings) -> PromptSet:
    return load_prompts(DataSettings(source=str(source), **settings))


def jsonl(tmp_path: Path, *rows, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path
