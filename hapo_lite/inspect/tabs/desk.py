"""What the tabs share, and what belongs to one browser tab."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.inspect import markup
from hapo_lite.inspect.generate import ModelShelf
from hapo_lite.inspect.runs import Run, open_run, run_names
from hapo_lite.inspect.tokens import TokenTable, csv_text
from hapo_lite.runs.trace import Trace

ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
"""For events that generate: all tabs of all browsers wait in one queue."""
QUIET = {"show_progress": "hidden", "trigger_mode": "always_last"}


@dataclass
class Shown:
    """The generation that a view shows, for its what-if and its CSV."""

    trace: Trace | None = None
    table: TokenTable | None = None
    method: Method = field(default_factory=Method)


@dataclass
class Session:
    """What belongs to one browser tab. The first four: what its views show.

    seen: how the run's files looked when it was shown; on_page: which of its completions is; unfolded: parts by name.
    """

    generated: Shown = field(default_factory=Shown)
    opened: Shown = field(default_factory=Shown)
    left: Shown = field(default_factory=Shown)
    right: Shown = field(default_factory=Shown)
    cancel: bool = False
    run: Run | None = None
    seen: Any = None
    on_page: Any = None
    unfolded: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Defaults:
    """What the boxes say before anybody has changed them."""

    method: Method = field(default_factory=Method)
    model: str = "tiny"
    adapter: str = ""
    quantization: str = "none"
    temperature: float = 1.0
    system_prompt: str = ""


class Desk:
    """The loaded models, the folder of runs, and a folder for downloads. model, adapter: of the command line."""

    def __init__(self, model: str, adapter: str, run: Path | None) -> None:
        self.model, self.adapter = model, adapter
        self.root = run.parent if run else Path("runs")
        self.first_run = run.name if run else ""
        if run:
            open_run(self.root, run.name)
        self.shelf = ModelShelf()
        self._downloads = tempfile.TemporaryDirectory(prefix="hapo-inspect-")

    def runs(self) -> list[str]:
        return run_names(self.root)

    def adapters(self) -> list[str]:
        found = [str(p) for name in self.runs() if (p := self.root / name / "adapter").is_dir()]
        return list(dict.fromkeys(["", self.adapter, *found]))

    def run(self, name: str) -> Run:
        """The run of that name. Raises UserError if it is none, or leads out of the folder of runs."""
        return open_run(self.root, name)

    def start(self) -> Defaults:
        """What the boxes begin with: the command line's model and adapter, else the opened run's settings."""
        if self.model or self.adapter:
            return Defaults(model=self.model or "tiny", adapter=self.adapter)
        return self.defaults(self.first_run)

    def defaults(self, name: str) -> Defaults:
        """What the run of that name trained with; "": HAPO on the bundled model. Raises UserError."""
        recipe = self.run(name).recipe if name else None
        if recipe is None:
            return Defaults()
        adapter = self.root / name / "adapter"
        return Defaults(
            method=recipe.method,
            model=recipe.model.name,
            adapter=str(adapter) if adapter.is_dir() else "",
            quantization=recipe.model.quantization,
            temperature=recipe.rollout.temperature,
            system_prompt=recipe.data.system_prompt or "",
        )

    def csv_file(self, session: Session, slot: str) -> str:
        """The table that `slot` of the session shows, as a file that its next one takes the place of."""
        shown: Shown = getattr(session, slot)
        folder = Path(self._downloads.name) / f"{id(session)}-{slot}"
        folder.mkdir(exist_ok=True)
        file = folder / ("tokens.csv" if slot in ("generated", "opened") else f"tokens-{slot}.csv")
        file.write_text(csv_text(shown.table) if shown.table else "", "utf-8")
        return str(file)


def arm(session: Session) -> None:
    """Before a generation is queued: an earlier cancel is over."""
    session.cancel = False


def stop(session: Session) -> None:
    """The generation of this tab ends after its token, also one that still waits in the queue."""
    session.cancel = True


def reading(text: str) -> None:
    """The one sentence on how to read a view."""
    gr.HTML(markup.note(text, "reading"))


def failed(error: Exception) -> str:
    return markup.note(str(error), "error")


def latest_signal(run: Run) -> EntropySignal:
    """The signal of the run's last iteration that has one. Raises UserError where there is none."""
    for iteration in reversed(run.iterations()):
        for trace in run.traces(iteration)[0]:
            if trace.signal is not None:
                return trace.signal
    raise UserError(f"{run.path} has no training trace with a signal: fit it on a first pass")
