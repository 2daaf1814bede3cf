"""The place of a view: the run, the iteration, the group and the completion that it shows, as an address names it.

An address is the fragment of a URL, such as `#run=tiny_cpu&iteration=60&stage=train&prompt=tiny-7&completion=3`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from urllib.parse import parse_qsl, quote, urlencode

LONGEST = 4000
"""Characters of an address that are read."""
LARGEST = 10**9


@dataclass(frozen=True)
class Place:
    """What a view shows. A field that is None or "" is not named by the address.

    stage, prompt: name a group of the iteration. completion: the number of its trace in the iteration's file. example:
    the number of a completion in the recorded group that the page opens on.
    """

    run: str = ""
    iteration: int | None = None
    stage: str = ""
    prompt: str = ""
    completion: int | None = None
    example: int | None = None

    @classmethod
    def parse(cls, address: str) -> Place:
        """The place that an address names. Parts that are unknown or no numbers are left out."""
        named = dict(parse_qsl(address[:LONGEST].removeprefix("#"), keep_blank_values=True, errors="replace"))
        numbers = {name: _number(named.get(name, "")) for name in ("iteration", "completion", "example")}
        return cls(named.get("run", ""), stage=named.get("stage", ""), prompt=named.get("prompt", ""), **numbers)

    @property
    def address(self) -> str:
        """The address, "#" included."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return "#" + urlencode(
            {k: v for k, v in named.items() if v not in (None, "")}, quote_via=quote, errors="replace"
        )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) <= LARGEST else None
