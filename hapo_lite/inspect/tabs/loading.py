"""A model that is being loaded: what is loaded, how large it is, and for how long, while the page waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from hapo_lite.inspect.markup import note
from hapo_lite.model.policy import Policy

EVERY_SECONDS = 0.5


def loading(load: Callable[[], Policy], name: str) -> Iterator[str]:
    """Load a model in a thread, and give a note about it twice a second. Afterwards `load` gives it at once.

    name: of the model, as it was asked for. Raises what `load` raises.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        loaded = pool.submit(load)
        while not loaded.done():
            wait([loaded], timeout=EVERY_SECONDS)
            if not loaded.done():
                yield note(f"Loading {weights(name)}: {time.monotonic() - started:.0f} s.")
        loaded.result()


def weights(name: str) -> str:
    """The model's name, with the size of its weights if it is a folder."""
    folder = Path(name.strip() or ".")
    files = list(folder.glob("*.safetensors")) if name.strip() and folder.is_dir() else []
    size = sum(file.stat().st_size for file in files)
    return f"{folder.name}, {size / 1e9:.2g} GB of weights" if size else name.strip()[:80] or "the model"
