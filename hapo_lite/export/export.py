"""One export, from the run's folder to the exported folder."""

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
from hapo_lite.export.merge import MergeSettings, merge, rewrite
from hapo_lite.export.push import Push
from hapo_lite.export.source import ADAPTER_CONFIG, TOKENIZER_FILES, WEIGHTS, Source, base_files, open_source
from hapo_lite.runs.files import replacing_folder
from hapo_lite.runs.folder import check_place

MARK = "export.json"
"""The file that marks a folder as an export and names its run and kind. Only a marked folder is overwritten."""


def export(
    run: Path,
    kind: str,
    output: Path | None = None,
    adapter: Path | None = None,
    settings: MergeSettings | None = None,
    push: Push | None = None,
) -> dict[str, Any]:
    """Write the run's adapter as `kind` (merged, gguf-ready or adapter), and return the content of export.json.

    output: the folder to write; None: RUN/export/KIND. adapter: the folder of a checkpoint; None: the run's last
    adapter. settings: of the merge. push: where it is uploaded to afterwards; None: nowhere. Raises UserError if the
    run, the folder or the disk cannot be used, or if the merged model differs from the adapter on its base; nothing new
    is left behind. Raises it too if the upload fails, and the exported folder stays.
    """
    settings = settings or MergeSettings()
    if push is not None:
        push.check()
    if kind == "adapter" and settings.onto is not None:
        raise UserError("--onto names the base of a merge, and --to adapter merges nothing: leave --onto out")
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
            merged = merge(source, aside, settings, print)
            record |= {"dtype": merged.drift.dtype, "drift": asdict(merged.drift)}
            record |= merged.choice.as_json() if merged.choice else {"onto": None, "four_bit": None}
            if kind == "gguf-ready":
                check_for_converter(aside)
        (aside / MARK).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (aside / "README.md").write_text(model_card(source, record, push.name if push else output), encoding="utf-8")
    print(f"{output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    if push is not None:
        print(push.upload(output))
    return record


def check_is_own(output: Path, source: Source, kind: str) -> None:
    """Raise UserError if `output` holds anything but an earlier export of this run to the same kind."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        before = json.loads((output / MARK).read_text(encoding="utf-8"))
        if (before["run"], before["kind"]) == (source.recipe.name, kind):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{output} is there already and is no {kind} export of {source.recipe.name}: give another --output, or move "
        "the folder away"
    )


def write_adapter(source: Source, folder: Path) -> None:
    """Write the adapter and the base's tokenizer. The adapter names its base as `from_pretrained` takes it."""
    shutil.copyfile(source.adapter / WEIGHTS, folder / WEIGHTS)
    shutil.copyfile(source.adapter / ADAPTER_CONFIG, folder / ADAPTER_CONFIG)
    named = {"base_model_name_or_path": source.base, "revision": source.revision}
    rewrite(folder / ADAPTER_CONFIG, lambda config: {**config, **named})
    files = base_files(source, TOKENIZER_FILES)
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    if not files:
        print(f"note: the adapter comes without a tokenizer: that of {source.model.name} is not on this machine")


def versions() -> dict[str, str]:
    """The versions of the packages that made the export, and of Python."""
    return {
        "hapo_lite": hapo_lite.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }
