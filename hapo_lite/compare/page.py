"""report.html: one file without scripts or requests, for a phone and a laptop, in light and in dark.

page.html is the template, and page.css its style. Jinja escapes every text that is put into the template.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import hapo_lite
from hapo_lite.compare.figures import DrawnPicture
from hapo_lite.compare.numbers import Numbers
from hapo_lite.compare.tables import SIGNS, difference_table, final_table, run_table
from hapo_lite.compare.words import caveats, findings
from hapo_lite.runs.progress import in_words


def page(numbers: Numbers, planned: int, missing: Sequence[str], drawn: Sequence[DrawnPicture]) -> str:
    """The text of report.html. planned: the number of runs; missing: a line for each that is not complete."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("page.html").render(
        comparison=numbers.comparison,
        planned=planned,
        missing=missing,
        findings=findings(numbers),
        final=final_table(numbers),
        differences=difference_table(numbers),
        every_run=run_table(numbers),
        signs=SIGNS,
        caveats=caveats(numbers),
        figures=[(d.picture, _address(d.light), _address(d.dark)) for d in drawn],
        version=hapo_lite.__version__,
        training_time=in_words(sum(run.measures["seconds"] for run in numbers.runs.values())),
    )


def _address(png: bytes) -> str:
    """A URL that holds the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
