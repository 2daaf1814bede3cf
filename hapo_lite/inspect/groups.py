"""The groups of an iteration, and where the completions of a group part.

The completions of a group form a tree: those that begin alike share a branch, and each node is a token. Axes: G
recorded completions of the group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_lite.inspect.runs import Entry


@dataclass(frozen=True)
class Group:
    """The recorded completions of one prompt in one iteration, in the order of the file.

    size, correct: the counts of the whole group, recorded or not, or of the recorded ones if the file does not say.
    """

    stage: str
    prompt: str
    entries: list[Entry]

    @property
    def known(self) -> bool:
        """Whether the file says how large the whole group was."""
        return self.entries[0].group_size >= len(self.entries)

    @property
    def size(self) -> int:
        """Completions of the group."""
        return self.entries[0].group_size if self.known else len(self.entries)

    @property
    def correct(self) -> int:
        """Correct completions of the group."""
        right = sum(entry.outcome == "correct" for entry in self.entries)
        return self.entries[0].group_correct if self.known else right

    @property
    def rewards(self) -> dict[str, float]:
        """Means over the recorded completions: the reward and, if it has parts, each part by its name."""
        means = {"reward": mean([entry.reward for entry in self.entries])}
        for name in self.entries[0].rewards:
            means[name] = mean([entry.rewards.get(name, 0.0) for entry in self.entries])
        return means

    @property
    def entropy(self) -> float:
        """Mean over all recorded tokens, nats."""
        return sum(e.entropy * e.length for e in self.entries) / sum(e.length for e in self.entries)

    @property
    def length(self) -> float:
        """Mean over the recorded completions, tokens."""
        return mean([entry.length for entry in self.entries])

    @property
    def outcomes(self) -> list[str]:
        """The different outcomes of the recorded completions, the most frequent one first."""
        found = [entry.outcome for entry in self.entries]
        return sorted(set(found), key=lambda outcome: (-found.count(outcome), outcome))


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


def groups_of(entries: Sequence[Entry]) -> list[Group]:
    """The groups of an iteration, in the order in which the file has them."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((entry.stage, entry.prompt_id), []).append(entry)
    return [Group(stage, prompt, members) for (stage, prompt), members in found.items()]


@dataclass(frozen=True)
class Branch:
    """Where one completion parts from the others of its group.

    forks: the positions at which a completion that agreed so far has another token, or has ended, ascending. alone: the
    last of them, from which on no other completion agrees; None if another completion begins with all of its tokens.
    shared: the number of first tokens that it has in common with the completion above it in the order of the tree.
    """

    forks: list[int]
    alone: int | None
    shared: int


@dataclass(frozen=True)
class Tree:
    """order: the completions' places, such that those that begin alike stand together. branches: [G], by place."""

    order: list[int]
    branches: list[Branch]


def prefix_tree(texts: Sequence[Sequence[int]]) -> Tree:
    """The tree of completions that are given by their token ids, G lists."""
    order = sorted(range(len(texts)), key=lambda place: (list(texts[place]), place))
    # Sorted, the completions that share most with one stand beside it, so neighbours tell the whole tree.
    shared = [0, *(common_prefix(texts[one], texts[other]) for one, other in itertools.pairwise(order)), 0]
    branches: dict[int, Branch] = {}
    for rank, place in enumerate(order):
        forks = sorted({*_falling(shared[rank::-1]), *_falling(shared[rank + 1 :])} if len(texts) > 1 else ())
        length = len(texts[place])
        twin = max(shared[rank], shared[rank + 1]) == length
        inside = [fork for fork in forks if fork < length]
        branches[place] = Branch(inside, None if twin or not inside else inside[-1], shared[rank])
    return Tree(order, [branches[place] for place in range(len(texts))])


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of first tokens that two completions have in common."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def _falling(neighbours: Sequence[int]) -> set[int]:
    """What a completion has in common with each on one side: the least of what lies between. The last is a wall."""
    found: set[int] = set()
    least: int | None = None
    for common in neighbours[:-1]:
        least = common if least is None else min(least, common)
        found.add(least)
    return found
