"""One export from the run's folder to the folder that is passed on."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import hapo_lite
from hapo_lite.errors import UserError, writing
from hapo_lite.export.card import model_card
from hapo_lite.export.gguf import check_for_converter
from hapo_lite.export.merge import merge, rewrite
from hapo_lite.export.source import ADAPTER_CONFIG, TOKENIZER_FILES, WEIGHTS, Source, base_files, open_source
from hapo_lite.runs.files import replacing_folder
from hapo_lite.runs.folder import check_place

MARK = "export.json"
"""Says that a folder is an export, of which run and kind; only such a one is written anew."""


def export(
    run: Path, kind: str, output: Path | None = None, adapter: Path | None = None, dtype: str = "auto"
) -> dict[str, Any]:
    """Write the run's adapter as `kind` (merged, gguf-ready or adapter), and return what export.json says of it.

    output: the folder; None: RUN/export/KIND. adapter: a checkpoint instead of the run's adapter. dtype: of merged
    weights. Raises UserError, and leaves nothing new, where the run, the folder or the disk will not do, or where the
    merged model is not the adapter on its base.
    """
    source = open_source(run, adapter)
    check_place(source.folder)
    output = (output or run / "export" / kind).resolve()
    check_is_own(output, source, kind)
    with writing(output), replacing_folder(output) as aside:
        record: dict[str, Any] = {
            "kind": kind,
            "run": source.recipe.name,
            "adapter_sha256": source.sha256,
            "base": {"name": source.model.name, "revision": source.revision},
            "origins": source.origins,
            "versions": versions(),
        }
        if kind == "adapter":
            write_adapter(source, aside)
        else:
            found, gap = merge(source, aside, dtype, print)
            record |= {"dtype": found.dtype, "drift": asdict(found), "four_bit": asdict(gap) if gap else None}
            if kind == "gguf-ready":
                check_for_converter(aside)
        (aside / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(source, record, output), encoding="utf-8")
    print(f"{output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    return record


def check_is_own(output: Path, source: Source, kind: str) -> None:
    """Raises UserError where `output` holds anything but an earlier export of this run to the same kind."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        before = json.loads((output / MARK).read_text(encoding="utf-8"))
        if (before["run"], before["kind"]) == (source.recipe.name, kind):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{output} is there already and is no {kind} export of {source.recipe.name}: give another --output, or move it "
        "away"
    )


def write_adapter(source: Source, folder: Path) -> None:
    """The adapter with its base named as a user elsewhere will find it, and the base's tokenizer."""
    shutil.copyfile(source.adapter / WEIGHTS, folder / WEIGHTS)
    shutil.copyfile(source.adapter / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    named = {"base_model_name_or_path": source.base, "revision": source.revision}
    rewrite(folder / ADAPTER_CONFIG, lambda config: {**config, **named})
    files = base_files(source, TOKENIZER_FILES)
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if not files:
        print(f"note: the tokenizer of {source.model.name} is not on this machine and so not beside the adapter")


def versions() -> dict[str, str]:
    return {
        "hapo_lite": hapo_lite.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
