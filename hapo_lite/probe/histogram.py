"""The pass rates of many prompts as a histogram in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WIDTH = 40
"""Characters of the longest bar."""


def histogram(shares: Sequence[float]) -> dict[str, int]:
    """The number of pass rates in each tenth, by its name. 0 and 1 stand alone, since such a prompt teaches nothing.

    The tenths meet so that [0.1, 0.9] is made of whole ones.
    """
    tenths = [(lower / 10, (lower + 1) / 10) for lower in range(1, 9)]
    counts = {"0": sum(share == 0 for share in shares), "(0, 0.1)": sum(0 < share < 0.1 for share in shares)}
    for lower, upper in tenths[:-1]:
        counts[f"[{lower:g}, {upper:g})"] = sum(lower <= share < upper for share in shares)
    lower, upper = tenths[-1]
    counts[f"[{lower:g}, {upper:g}]"] = sum(lower <= share <= upper for share in shares)
    counts["(0.9, 1)"] = sum(0.9 < share < 1 for share in shares)
    counts["1"] = sum(share == 1 for share in shares)
    return counts


def lines_of(counts: Mapping[str, int]) -> list[str]:
    """The histogram for the terminal: a line for each tenth with its count, its share and a bar."""
    total = max(sum(counts.values()), 1)
    largest = max([*counts.values(), 1])
    digits = len(f"{largest:,}")
    return [
        f"{name:>10}  {count:>{digits},}  {100 * count / total:5.1f} %  {'#' * round(WIDTH * count / largest)}".rstrip()
        for name, count in counts.items()
    ]
