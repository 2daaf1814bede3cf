"""What a place of a run shows, if it is still there, and the links to it and beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hapo_lite.inspect.groups import Group, groups_of
from hapo_lite.inspect.places import Place
from hapo_lite.inspect.runs import Entry, Run
from hapo_lite.inspect.tokens import visible

Links = list[tuple[str, Place]]


@dataclass(frozen=True)
class Found:
    """An iteration, and the group and the completion of it that a place names; None where it names none.

    place: the place, with what is not there left out. number: of the iteration. entries: all of the iteration.
    """

    place: Place
    number: int
    entries: Sequence[Entry]
    groups: list[Group]
    group: Group | None = None
    entry: Entry | None = None

    @property
    def level(self) -> str:
        """overview, group or completion."""
        if self.entry is not None:
            return "completion"
        return "overview" if self.group is None else "group"


def find(run: Run, place: Place) -> Found:
    """What a place names, or the nearest thing that there is. Without an iteration: `Run.telling_iteration`."""
    number = nearest(run, place.iteration) if place.iteration is not None else run.telling_iteration() or 0
    entries, _ = run.entries(number) if run.iterations() else ([], [])
    here = Place(place.run, number)
    groups = groups_of(entries)
    group = next((g for g in groups if g.prompt == place.prompt and place.stage in ("", g.stage)), None)
    if place.completion is not None:
        members = entries if not place.prompt else group.entries if group else []
        entry = next((e for e in members if e.place == place.completion), None)
        if entry is not None:
            group = next(g for g in groups if entry in g.entries)
            there = replace(here, stage=group.stage, prompt=group.prompt, completion=entry.place)
            return Found(there, number, entries, groups, group, entry)
    if group is None or not place.prompt:
        return Found(here, number, entries, groups)
    return Found(replace(here, stage=group.stage, prompt=group.prompt), number, entries, groups, group)


def trail(found: Found) -> tuple[Links, Links]:
    """The links from the run down to what was found, and those to what stands before and after it."""
    top = Place(found.place.run, found.number)
    names: Links = [(f"iteration {found.number}", top)]
    group, entry = found.group, found.entry
    if group is None:
        return [(found.place.run, Place(found.place.run)), *names], []
    within = replace(top, stage=group.stage, prompt=group.prompt)
    names.append((visible(group.entries[0].question or group.prompt, 60), within))
    if entry is None:
        others = [replace(top, stage=g.stage, prompt=g.prompt) for g in found.groups]
        beside = _beside(others, found.groups.index(group), "prompt")
    else:
        names.append((f"sample {entry.sample}", replace(within, completion=entry.place)))
        others = [replace(within, completion=e.place) for e in group.entries]
        beside = _beside(others, group.entries.index(entry), "completion")
    return [(found.place.run, Place(found.place.run)), *names], beside


def _beside(places: Sequence[Place], here: int, noun: str) -> Links:
    """The links to the places before and after the one at `here`."""
    before = [(f"‹ previous {noun}", places[here - 1])] if here > 0 else []
    after = [(f"next {noun} ›", places[here + 1])] if here + 1 < len(places) else []
    return [*before, *after]


def nearest(run: Run, iteration: int) -> int:
    """The iteration with traces that is nearest to `iteration`; 0 if none has traces."""
    return min(run.iterations(), key=lambda i: abs(i - iteration), default=0)
