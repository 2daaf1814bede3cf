"""The page's scripts and styles: every `*.js` and `*.css` file of this folder is loaded, `page.*` first."""

from __future__ import annotations

from pathlib import Path

from hapo_lite.inspect import colour

FOLDER = Path(__file__).parent


def script() -> str:
    """The scripts as one text."""
    return _joined("js")


def style() -> str:
    """The styles as one text, the colours of the tokens included."""
    return _joined("css") + colour.palette_css()


def _joined(suffix: str) -> str:
    files = sorted(FOLDER.glob(f"*.{suffix}"), key=lambda file: (file.stem != "page", file.name))
    return "\n".join(file.read_text("utf-8") for file in files)
