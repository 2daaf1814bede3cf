"""The state of the inspector: what all its pages share, and what belongs to one browser tab."""

from __future__ import annotations

import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.errors import UserError
from hapo_lite.inspect import markup
from hapo_lite.inspect.generate import GenerationSettings, ModelShelf
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.runs import Run, RunFiles, Stamp, open_run, run_names
from hapo_lite.inspect.tokens import csv_text
from hapo_lite.inspect.views import Shown
from hapo_lite.model.policy import Policy

RUNS_HELD = 4
"""Runs whose files stay in memory, also when no page shows them."""
FIRST_PASS = "first pass"
FROM_RUN = "run's latest"
"""FIRST_PASS and FROM_RUN are the choices for the signal of a generation."""
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
"""Options of an event that generates: all tabs of all browsers wait in one queue."""
NO_PROGRESS: dict[str, Any] = {"show_progress": "hidden"}
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
"""Options of an event that may come often: only the last one that waits is handled."""
IN_ORDER: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "place"}
"""Options of an event that changes what the tab Run shows: the place that was asked for last is shown last."""

Fingerprint = tuple[list[int], int]
"""A run's iterations with traces, and the modification time of its metrics, ns."""


Drawn = tuple[Path, Place, Stamp | None]
"""A run's folder, a place of the run, and the stamp of the iteration's file when it was read."""


@dataclass(frozen=True)
class Written:
    """What a generation was written with. policy: loads the model, unless the shelf still holds it."""

    policy: Callable[[], Policy]
    settings: GenerationSettings


@dataclass
class Session:
    """The state of one browser tab.

    shown: the generation of each view, by its slot. cancel: the generation under way is to end. run: the open run.
    place: the place of it on the page. following: nobody has picked an iteration, so the page goes to each new one.
    seen: the fingerprint of its files when the page was filled. indexed: that when the prompts of all iterations were
    listed. drawn: what each level of the tab Run shows. unfolded: the names of the parts that are unfolded. written:
    what the last generation was written with.
    """

    shown: dict[str, Shown] = field(default_factory=dict)
    cancel: bool = False
    run: Run | None = None
    place: Place = field(default_factory=Place)
    following: bool = True
    seen: Fingerprint | None = None
    indexed: Fingerprint | None = None
    drawn: dict[str, Drawn] = field(default_factory=dict)
    unfolded: set[str] = field(default_factory=set)
    written: Written | None = None

    def leave_run(self) -> None:
        """Forget the open run, so that the page is filled with the next one as a whole."""
        self.run = self.seen = self.indexed = None

    def draws(self, level: str, run: Run, place: Place) -> bool:
        """Whether a level of the tab Run is to be drawn anew. What it shows already stays, as a reader may read it."""
        try:
            stamp = run.stamp(place.iteration or 0)
        except (UserError, OSError):
            stamp = None
        wanted = (run.path, place, stamp)
        if self.drawn.get(level) == wanted:
            return False
        self.drawn[level] = wanted
        return True


@dataclass(frozen=True)
class Defaults:
    """The content of the boxes before anybody has changed them."""

    method: Method = field(default_factory=Method)
    model: str = "tiny"
    adapter: str = ""
    quantization: Literal["none", "nf4"] = "none"
    temperature: float = 1.0
    system_prompt: str = ""


class AppState:
    """The state that all pages share: the loaded models, the folder of runs, and a folder for downloads.

    model, adapter, run: those of the command line, or "" and None. Raises UserError if `run` cannot be opened.
    """

    def __init__(self, model: str, adapter: str, run: Path | None) -> None:
        self.model = model
        self.adapter = adapter
        self.root = run.parent if run else Path("runs")
        self.first_run = run.name if run else ""
        if run:
            open_run(self.root, run.name)
        self.shelf = ModelShelf()
        self._files: OrderedDict[str, RunFiles] = OrderedDict()
        self._lock = threading.Lock()
        self._downloads = tempfile.TemporaryDirectory(prefix="hapo-inspect-")

    def close(self) -> None:
        """Remove the folder for downloads, which otherwise goes with the process."""
        self._downloads.cleanup()

    def runs(self) -> list[str]:
        """The names of the runs, newest first."""
        return run_names(self.root)

    def adapters(self) -> list[str]:
        """The folders of adapters to choose from. The first is "", for none."""
        folders = [self.root / name / "adapter" for name in self.runs()]
        found = [str(folder) for folder in folders if folder.is_dir()]
        return list(dict.fromkeys(["", self.adapter, *found]))

    def run(self, name: str) -> Run:
        """The run of that name. Raises UserError if it is not a run, or leads out of the folder of runs.

        Its settings are read anew, but of its other files only what no page has read.
        """
        with self._lock:
            run = open_run(self.root, name, self._files.get(name))
            self._files[name] = run.files
            self._files.move_to_end(name)
            if len(self._files) > RUNS_HELD:
                self._files.popitem(last=False)
        return run

    def start(self) -> Defaults:
        """The defaults of a new page: the command line's model and adapter, else the settings of its run."""
        if self.model or self.adapter:
            return Defaults(model=self.model or "tiny", adapter=self.adapter)
        return self.defaults(self.first_run)

    def defaults(self, name: str) -> Defaults:
        """The settings of the run of that name; "": HAPO on the bundled model. Raises UserError."""
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
        """The path of a CSV file with the table of a view. The view's next table overwrites it."""
        shown = session.shown.get(slot)
        folder = Path(self._downloads.name) / f"{id(session)}-{slot}"
        folder.mkdir(exist_ok=True)
        file = folder / ("tokens.csv" if slot in ("generated", "opened") else f"tokens-{slot}.csv")
        file.write_text(csv_text(shown.table) if shown else "", "utf-8")
        return str(file)


def arm(session: Session) -> None:
    """Forget an earlier cancel. Runs before a generation is queued."""
    session.cancel = False


def stop(session: Session) -> None:
    """End the generation of this browser tab after its next token, even if it still waits in the queue."""
    session.cancel = True


def explain(text: str) -> None:
    """Add a sentence to the page that says how to read a view."""
    gr.HTML(markup.note(text, "reading"))


def error_note(error: Exception) -> str:
    """The HTML of an error's text."""
    return markup.note(str(error), "error")


def latest_signal(run: Run) -> EntropySignal:
    """The signal of the run's last iteration that has one. Raises UserError if there is none."""
    for iteration in reversed(run.iterations()):
        for trace in run.traces(iteration)[0]:
            if trace.signal is not None:
                return trace.signal
    raise UserError(f"{run.path} has no training trace with a signal: set the signal to {FIRST_PASS}")
