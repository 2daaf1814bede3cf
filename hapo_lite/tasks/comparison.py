"""How two shapes compare: which brackets, orders and names count. `Values` compares the values in them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from hapo_lite.tasks.notation import canonical, plain_number
from hapo_lite.tasks.shapes import MOST_PARTS, Shape, assigned, is_name, parse, record

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


class Link(NamedTuple):
    """One sign of an inequality with its two sides, which are texts in tidy notation."""

    left: str
    sign: str
    right: str

    def mirrored(self) -> Link:
        """The same inequality with its sides exchanged."""
        return Link(self.right, _MIRRORED.get(self.sign, self.sign), self.left)


@dataclass
class Values:
    """The arithmetic and algebra that the comparison of shapes needs; texts are in tidy notation, the gold one first.

    same_value compares two numbers or expressions, same_equation two equations as (left, right), same_inequality two
    inequalities, and same_set two sets of numbers whose parts alone do not decide.
    """

    same_value: Callable[[str, str], bool]
    same_equation: Callable[[tuple[str, str], tuple[str, str]], bool]
    same_inequality: Callable[[Link, Link], bool]
    same_set: Callable[[Shape, Shape], bool]


@dataclass
class Comparison:
    """Compares shapes, the gold answer first, and remembers its verdicts."""

    values: Values
    _known: dict[tuple[str, str], bool] = field(default_factory=dict)

    def same(self, gold: Shape, answer: Shape) -> bool:
        """Whether an answer is equal to the gold answer."""
        key = gold.text, answer.text
        if key not in self._known:
            self._known[key] = self._same(gold, answer)
        return self._known[key]

    def _same(self, gold: Shape, answer: Shape) -> bool:
        if gold.kind == "value" == answer.kind:
            return self.values.same_value(gold.text, answer.text)
        kinds = {gold.kind, answer.kind}
        if "inequality" in kinds or _joined_inequalities(gold) or _joined_inequalities(answer):
            return self._same_inequalities(gold, answer)
        if "equation" in kinds:
            return self._same_equations(gold, answer)
        if "record" in kinds:
            return self._same_records(gold, answer)
        if "residue" in kinds:
            return gold.kind == answer.kind and self._in_order(gold.parts, answer.parts)
        if "union" in kinds:
            return self._without_order(_parts(gold), _parts(answer)) or self.values.same_set(gold, answer)
        if "matrix" in kinds:
            return self._same_matrices(gold, answer)
        return self._same_collections(gold, answer)

    def _same_collections(self, gold: Shape, answer: Shape) -> bool:
        """Whether two lists, points or sets agree.

        A list takes the order of a point that it is compared with; a point is never equal to a set.
        """
        kinds = {gold.kind, answer.kind}
        if gold.names and answer.names and gold.names != answer.names:
            return False
        if gold.brackets != answer.brackets and "cases" in (gold.brackets, answer.brackets):
            return False
        if kinds == {"point"}:
            brackets = gold.brackets == answer.brackets or len(gold.parts) > 2
            return brackets and self._in_order(gold.parts, answer.parts)
        if kinds == {"point", "list"}:
            point, other = (gold, answer) if gold.kind == "point" else (answer, gold)
            if all(part.kind == "value" for part in other.parts):
                interval = point.brackets != "()" and len(point.parts) == 2
                return not interval and self._in_order(gold.parts, answer.parts)
        if kinds != {"value", "point"} and self._without_order(_parts(gold), _parts(answer)):
            return True
        return "value" in kinds and self.values.same_set(gold, answer)

    def _in_order(self, gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
        return len(gold) == len(answer) and all(self.same(g, a) for g, a in zip(gold, answer, strict=True))

    def _without_order(self, gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
        """Whether two collections have the same values, each as often in both.

        Where one side has no value twice, the other may repeat some: 4, 4 is 4.
        """
        if len(gold) > MOST_PARTS or len(answer) > MOST_PARTS:
            return False
        if self._one_to_one(gold, answer):
            return True
        return len(gold) != len(answer) and (_distinct(gold) or _distinct(answer)) and self._each_found(gold, answer)

    def _one_to_one(self, gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
        """Whether every member of one side has a partner of its own on the other."""
        # Members of the same text pair off first: comparing values takes far longer.
        places = {canonical(a.text): place for place, a in enumerate(answer)}
        paired: set[int] = set()
        unpaired = []
        for g in gold:
            place = places.pop(canonical(g.text), None)
            if place is None:
                unpaired.append(g)
            else:
                paired.add(place)
        left = [a for place, a in enumerate(answer) if place not in paired]
        for g in unpaired:
            match = next((i for i, a in enumerate(left) if self._same_member(g, a)), None)
            if match is None:
                return False
            del left[match]
        return not left

    def _each_found(self, gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
        return all(any(self._same_member(g, a) for a in answer) for g in gold) and all(
            any(self._same_member(g, a) for g in gold) for a in answer
        )

    def _same_member(self, gold: Shape, answer: Shape) -> bool:
        r"""Whether two members of collections agree: within a collection \{1\} is not 1."""
        return (gold.kind == "set") == (answer.kind == "set") and self.same(gold, answer)

    def _same_matrices(self, gold: Shape, answer: Shape) -> bool:
        if gold.kind == answer.kind:
            return self._in_order(gold.parts, answer.parts)
        g, a = _column(gold), _column(answer)
        if g is not None and a is not None:
            return self._in_order(g, a)
        return {gold.kind, answer.kind} == {"matrix", "value"} and self.values.same_value(gold.text, answer.text)

    def _same_equations(self, gold: Shape, answer: Shape) -> bool:
        """Whether two equations hold for the same points, or one side is what the other's equation names."""
        if gold.kind == answer.kind:
            return self._same_two_equations(gold, answer)
        if answer.kind == "equation":
            named = _as_record(answer)
            if named is not None and gold.kind == "record":
                return self._same_records(gold, named)
            negated = answer.parts[0].text.startswith("-") and not _is_numeric(answer.parts[0])
            given = assigned(answer)
            value = given[1] if given is not None else answer.parts[-1]
            return not negated and self._is_true(answer) and self.same(gold, value)
        named = _as_record(gold)
        if named is not None and answer.kind == "record":
            return self._same_records(named, answer)
        return any(is_name(part.text) for part in gold.parts[:-1]) and self.same(gold.parts[-1], answer)

    def _same_two_equations(self, gold: Shape, answer: Shape) -> bool:
        g, a = assigned(gold), assigned(answer)
        if not self._is_true(answer):
            return False
        if g and a and g[0] == a[0]:
            return self.same(g[1], a[1])
        if g is not None and a is None and _is_numeric(g[1]):
            # 3x+1=16 is the task whose answer is x=5.
            return False
        if any(part.kind != "value" for shape in (gold, answer) for part in shape.parts):
            return self._in_order(gold.parts, answer.parts)
        if len(gold.parts) > 2 or len(answer.parts) > 2:
            return self.same(gold.parts[0], answer.parts[0]) and self.same(gold.parts[-1], answer.parts[-1])
        return self.values.same_equation(
            (gold.parts[0].text, gold.parts[-1].text), (answer.parts[0].text, answer.parts[-1].text)
        )

    def _is_true(self, equation: Shape) -> bool:
        """Whether the sides of an equation without letters are equal: those of 6*7=42 are, those of 3=5 are not.

        A decimal may be rounded, so that it is held against other numbers only, and may differ by ROUNDED.
        """
        return all(self._true_pair(*sides) for sides in pairwise(side for side in equation.parts if _is_numeric(side)))

    def _true_pair(self, left: Shape, right: Shape) -> bool:
        x, y = plain_number(left.text), plain_number(right.text)
        if (x is None or not x.digits) and (y is None or not y.digits):
            return self.same(left, right)
        return x is None or y is None or abs(x.value - y.value) <= ROUNDED * abs(y.value)

    def _same_records(self, gold: Shape, answer: Shape) -> bool:
        """Whether two records agree name by name; a record and a point or list agree in the order of the names."""
        if gold.kind == answer.kind:
            if set(gold.names) != set(answer.names):
                return False
            by_name = dict(zip(answer.names, answer.parts, strict=True))
            return all(self.same(g, by_name[n]) for n, g in zip(gold.names, gold.parts, strict=True))
        record, other = (gold, answer) if gold.kind == "record" else (answer, gold)
        if other.kind not in ("point", "list") or (other.kind == "point" and other.brackets != "()"):
            return False
        if other.names or any(part.kind == "equation" for part in other.parts):
            return False
        named = sorted(zip(record.names, record.parts, strict=True), key=lambda pair: pair[0])
        alphabetical = tuple(part for _, part in named)
        orders = {alphabetical, record.parts} if other.kind == "list" else {alphabetical}
        pairs = [(values, other.parts) if record is gold else (other.parts, values) for values in orders]
        return any(self._in_order(*pair) for pair in pairs)

    def _same_inequalities(self, gold: Shape, answer: Shape) -> bool:
        """Inequalities in one letter are compared as intervals, others side by side, whichever way round."""
        gold_range, answer_range = _range_of(gold), _range_of(answer)
        if gold_range is not None and answer_range is not None:
            names = {letter for letter in (gold_range[0], answer_range[0]) if letter}
            if len(names) == 1:
                intervals = gold_range[1], answer_range[1]
                return self.same(*intervals) or self.values.same_set(*intervals)
        if gold_range is not None and answer_range is None and gold_range[0] and _is_numeric(gold_range[1]):
            # 2x+1>7 is the task whose answer is x>3.
            return False
        if gold.kind == "inequality" and answer_range is not None and answer_range[0] is None:
            return self.values.same_set(gold, answer)
        return self._same_links(gold, answer) or (gold.kind == answer.kind and self.values.same_set(gold, answer))

    def _same_links(self, gold: Shape, answer: Shape) -> bool:
        gold_links, answer_links = _links(gold), _links(answer)
        if gold_links is None or answer_links is None or len(gold_links) != len(answer_links):
            return False
        left = list(answer_links)
        for link in gold_links:
            match = next((i for i, other in enumerate(left) if self.values.same_inequality(link, other)), None)
            if match is None:
                return False
            del left[match]
        return True


ROUNDED = Fraction(1, 50)
"""Largest relative error of a decimal that is set equal to another number within an answer."""
_COMMANDS = re.compile(r"\\text\s*\{[^{}]*\}|\\[a-zA-Z]+")
_GREEK = re.compile(
    r"\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega)"
    r"(?![a-zA-Z])",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"[a-df-hj-zA-Z]")


def _is_numeric(shape: Shape) -> bool:
    """Whether a shape has no variables. e and i are numbers. Words and commands of LaTeX are no variables."""
    return _VARIABLE.search(_COMMANDS.sub(" ", _GREEK.sub("x", shape.text))) is None


def _parts(shape: Shape) -> tuple[Shape, ...]:
    return shape.parts if shape.kind in ("list", "set", "union") else (shape,)


def _distinct(parts: tuple[Shape, ...]) -> bool:
    return len({canonical(part.text) for part in parts}) == len(parts)


def _column(shape: Shape) -> tuple[Shape, ...] | None:
    """The entries of a matrix of one column, or of a point: (1,2) is a column and no row."""
    if shape.kind == "point" and shape.brackets == "()":
        return shape.parts
    if shape.kind == "matrix" and len(shape.parts) > 1 and all(len(row.parts) == 1 for row in shape.parts):
        return tuple(row.parts[0] for row in shape.parts)
    return None


def _as_record(shape: Shape) -> Shape | None:
    """(x,y)=(1,2) as a record of x and y; None for other equations."""
    left, right = shape.parts[0], shape.parts[-1]
    if left.kind == "point" == right.kind and len(left.parts) == len(right.parts):
        names = tuple(canonical(part.text).replace(" ", "") for part in left.parts)
        return record(names, right.parts)
    return None


def _joined_inequalities(shape: Shape) -> bool:
    return shape.kind == "list" and shape.signs in (("and",), ("or",))


_BOUND = re.compile(r"(?:[a-zA-Z]|\\(?!infty|pi|emptyset)[a-zA-Z]+ ?)(?:_\{?\w+\}?)?(?: ?\([a-zA-Z]\))?")


def _range_of(shape: Shape) -> tuple[str | None, Shape] | None:
    """(letter, interval or union) of an inequality in one letter; (None, range) of a range; None of others."""
    if shape.kind in ("point", "union", "set") or (shape.kind == "value" and r"\mathbb" in shape.text):
        return None, shape
    bounds = _bounds(shape)
    if not bounds or len({bound.left for bound in bounds}) != 1:
        return None
    alternatives = shape.signs == ("or",) and shape.kind == "list"
    ends: dict[str, tuple[str, str]] = {}
    texts = []
    for bound in bounds:
        if bound.sign == "!=":
            if len(bounds) > 1:
                return None
            return bound.left, parse(rf"(-\infty,{bound.right}) \cup ({bound.right},\infty)")
        side, end = _end_of_interval(bound)
        if alternatives:
            texts.append(_interval({side: end}))
        elif side in ends:
            return None
        else:
            ends[side] = end
    if ends:
        texts.append(_interval(ends))
    return bounds[0].left, parse(r" \cup ".join(texts))


def _end_of_interval(bound: Link) -> tuple[str, tuple[str, str]]:
    """The side, "left" or "right", on which a bound ends an interval, and (bracket, value) of that end."""
    closed = "=" in bound.sign
    if bound.sign[0] == ">":
        return "left", ("[" if closed else "(", bound.right)
    return "right", ("]" if closed else ")", bound.right)


def _interval(ends: dict[str, tuple[str, str]]) -> str:
    opening, low = ends.get("left", ("(", r"-\infty"))
    closing, high = ends.get("right", (")", r"\infty"))
    return f"{opening}{low},{high}{closing}"


def _links(shape: Shape) -> list[Link] | None:
    """Each sign of an inequality, of a chain of inequalities, or of several joined by "and" or "or"; else None."""
    if _joined_inequalities(shape):
        return [link for part in shape.parts for link in _links(part) or []]
    if shape.kind != "inequality" or not all(sign in ("<", "<=", ">", ">=", "!=") for sign in shape.signs):
        return None
    sides = [part.text for part in shape.parts]
    return [Link(*link) for link in zip(sides, shape.signs, sides[1:], strict=False)]


def _bounds(shape: Shape) -> list[Link] | None:
    """The links of an inequality, each with its letter on the left; None where one of them bounds no letter."""
    links = _links(shape)
    if links is None:
        return None
    # a < x < b bounds x, whatever a and b are.
    if len(links) == 2 and links[0].right == links[1].left and _BOUND.fullmatch(links[0].right):
        return [links[0].mirrored(), links[1]]
    bounds = [_with_letter_left(link) for link in links]
    return [bound for bound in bounds if bound is not None] if None not in bounds else None


def _with_letter_left(link: Link) -> Link | None:
    letter_left, letter_right = (_BOUND.fullmatch(side) is not None for side in (link.left, link.right))
    if letter_left == letter_right:
        return None
    return link if letter_left else link.mirrored()
