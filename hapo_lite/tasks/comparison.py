"""How two shapes compare: which brackets, orders and names count. The values are left to `Values`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from hapo_lite.tasks.notation import canonical
from hapo_lite.tasks.shapes import MOST_PARTS, Shape, assigned, is_name, parse, record


@dataclass
class Values:
    """What the comparison of shapes leaves to arithmetic and algebra; texts are in tidy notation.

    same_value: one number or expression. same_equation: two equations as (left, right). same_inequality: (left, sign,
    right) twice. same_set: any two sets, where their parts alone do not tell.
    """

    same_value: Callable[[str, str], bool]
    same_equation: Callable[[tuple[str, str], tuple[str, str]], bool]
    same_inequality: Callable[[tuple[str, str, str], tuple[str, str, str]], bool]
    same_set: Callable[[Shape, Shape], bool]


@dataclass
class Comparison:
    """Compares shapes, gold first. values: see there."""

    values: Values
    _known: dict[tuple[str, str], bool] = field(default_factory=dict)

    def same(self, gold: Shape, answer: Shape) -> bool:
        """Whether an answer is as right as the gold answer."""
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
        """Lists, points and sets. A list takes the order of a point it is compared with; a point is never a set."""
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
        """The same values, each as often; or each once on one side, where the other repeats some: 4, 4 is 4."""
        if len(gold) > MOST_PARTS or len(answer) > MOST_PARTS:
            return False
        known = {canonical(a.text): i for i, a in enumerate(answer)}
        pairs = {i: known.pop(key) for i, g in enumerate(gold) if (key := canonical(g.text)) in known}
        left = [a for i, a in enumerate(answer) if i not in pairs.values()]
        for g in (g for i, g in enumerate(gold) if i not in pairs):
            match = next((i for i, a in enumerate(left) if self._same_member(g, a)), None)
            if match is None:
                break
            del left[match]
        else:
            if not left:
                return True
        return len(gold) != len(answer) and (_distinct(gold) or _distinct(answer)) and self._each_found(gold, answer)

    def _each_found(self, gold: tuple[Shape, ...], answer: tuple[Shape, ...]) -> bool:
        return all(any(self._same_member(g, a) for a in answer) for g in gold) and all(
            any(self._same_member(g, a) for g in gold) for a in answer
        )

    def _same_member(self, gold: Shape, answer: Shape) -> bool:
        r"""Within a collection \{1\} is not 1."""
        return (gold.kind == "set") == (answer.kind == "set") and self.same(gold, answer)

    def _same_matrices(self, gold: Shape, answer: Shape) -> bool:
        if gold.kind == answer.kind:
            return self._in_order(gold.parts, answer.parts)
        return {gold.kind, answer.kind} == {"matrix", "value"} and self.values.same_value(gold.text, answer.text)

    def _same_equations(self, gold: Shape, answer: Shape) -> bool:
        """Two equations hold for the same points; or one side only names what it states."""
        if gold.kind == answer.kind:
            g, a = assigned(gold), assigned(answer)
            if g and a and g[0] == a[0]:
                return self.same(g[1], a[1])
            if any(part.kind != "value" for shape in (gold, answer) for part in shape.parts):
                return self._in_order(gold.parts, answer.parts)
            if len(gold.parts) > 2 or len(answer.parts) > 2:
                return self.same(gold.parts[0], answer.parts[0]) and self.same(gold.parts[-1], answer.parts[-1])
            sides = [(shape.parts[0].text, shape.parts[-1].text) for shape in (gold, answer)]
            return self.values.same_equation(*sides)
        if answer.kind == "equation":
            if (record := _as_record(answer)) is not None and gold.kind == "record":
                return self._same_records(gold, record)
            return not answer.parts[0].text.startswith("-") and self.same(gold, answer.parts[-1])
        if (record := _as_record(gold)) is not None and answer.kind == "record":
            return self._same_records(record, answer)
        return any(is_name(part.text) for part in gold.parts[:-1]) and self.same(gold.parts[-1], answer)

    def _same_records(self, gold: Shape, answer: Shape) -> bool:
        """Records agree name by name; with a point or list, in the order of the names."""
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
        by_name = tuple(part for _, part in sorted(zip(record.names, record.parts, strict=True), key=lambda p: p[0]))
        orders = {by_name, record.parts} if other.kind == "list" else {by_name}
        pairs = [(values, other.parts) if record is gold else (other.parts, values) for values in orders]
        return any(self._in_order(*pair) for pair in pairs)

    def _same_inequalities(self, gold: Shape, answer: Shape) -> bool:
        """Inequalities in one letter are intervals; others are compared side by side, whichever way round."""
        ranges = _range_of(gold), _range_of(answer)
        names = {r[0] for r in ranges if r is not None and r[0]}
        if None not in ranges and len(names) == 1:
            return self.same(ranges[0][1], ranges[1][1]) or self.values.same_set(ranges[0][1], ranges[1][1])
        if gold.kind == "inequality" and ranges[1] is not None and ranges[1][0] is None:
            return self.values.same_set(gold, answer)
        return self._same_links(gold, answer) or (gold.kind == answer.kind and self.values.same_set(gold, answer))

    def _same_links(self, gold: Shape, answer: Shape) -> bool:
        links = _links(gold), _links(answer)
        if None in links or len(links[0]) != len(links[1]):
            return False
        left = list(links[1])
        for link in links[0]:
            match = next((i for i, other in enumerate(left) if self.values.same_inequality(link, other)), None)
            if match is None:
                return False
            del left[match]
        return True


def _parts(shape: Shape) -> tuple[Shape, ...]:
    return shape.parts if shape.kind in ("list", "set", "union") else (shape,)


def _distinct(parts: tuple[Shape, ...]) -> bool:
    return len({canonical(part.text) for part in parts}) == len(parts)


def _as_record(shape: Shape) -> Shape | None:
    """(x,y)=(1,2) as a record of x and y, and x=1 as a record of one."""
    left, right = shape.parts[0], shape.parts[-1]
    if left.kind == "point" == right.kind and len(left.parts) == len(right.parts):
        names = tuple(canonical(part.text).replace(" ", "") for part in left.parts)
        return record(names, right.parts)
    return None


def _joined_inequalities(shape: Shape) -> bool:
    return shape.kind == "list" and shape.signs in (("and",), ("or",))


_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_BOUND = re.compile(r"(?:[a-zA-Z]|\\(?!infty|pi|emptyset)[a-zA-Z]+ ?)(?:_\{?\w+\}?)?(?: ?\([a-zA-Z]\))?")


def _range_of(shape: Shape) -> tuple[str | None, Shape] | None:
    """(letter, interval or union) that an inequality in one letter stands for; a range itself has no letter."""
    if shape.kind in ("point", "union", "set") or (shape.kind == "value" and r"\mathbb" in shape.text):
        return None, shape
    links = _links(shape)
    if links is None:
        return None
    bounds = _bounds_of_middle(links) or [_bound(*link) for link in links]
    if None in bounds or len({name for name, _, _ in bounds}) != 1:
        return None
    sides: dict[str, tuple[str, str]] = {}
    texts = []
    for _, sign, value in bounds:
        if sign == "!=":
            if len(bounds) > 1:
                return None
            texts += [rf"(-\infty,{value})", rf"({value},\infty)"]
            continue
        side = "left" if sign[0] == ">" else "right"
        bracket = ("[" if side == "left" else "]") if "=" in sign else ("(" if side == "left" else ")")
        if shape.signs == ("or",) and shape.kind == "list":
            texts.append(_interval({side: (bracket, value)}))
        elif side in sides:
            return None
        else:
            sides[side] = bracket, value
    texts += [_interval(sides)] if sides else []
    return bounds[0][0], parse(r" \cup ".join(texts))


def _interval(sides: dict[str, tuple[str, str]]) -> str:
    left, right = sides.get("left", ("(", r"-\infty")), sides.get("right", (")", r"\infty"))
    return f"{left[0]}{left[1]},{right[1]}{right[0]}"


def _links(shape: Shape) -> list[tuple[str, str, str]] | None:
    """(left, sign, right) of each sign in an inequality, a chain of them, or several joined by "and"."""
    if _joined_inequalities(shape):
        return [link for part in shape.parts for link in _links(part) or []]
    if shape.kind != "inequality" or not all(sign in ("<", "<=", ">", ">=", "!=") for sign in shape.signs):
        return None
    sides = [part.text for part in shape.parts]
    return list(zip(sides, shape.signs, sides[1:], strict=False))


def _bounds_of_middle(links: list[tuple[str, str, str]]) -> list[tuple[str, str, str]] | None:
    """The bounds of x in a < x < b, whatever a and b are."""
    if len(links) != 2 or links[0][2] != links[1][0] or not _BOUND.fullmatch(links[0][2].strip()):
        return None
    (low, first, letter), (_, second, high) = links
    return [(letter.strip(), _MIRRORED.get(first, first), low.strip()), (letter.strip(), second, high.strip())]


def _bound(left: str, sign: str, right: str) -> tuple[str, str, str] | None:
    """(letter, sign, value) with the letter on the left."""
    letters = [_BOUND.fullmatch(side.strip()) is not None for side in (left, right)]
    if letters[0] and not letters[1]:
        return left.strip(), sign, right.strip()
    if letters[1] and not letters[0]:
        return right.strip(), _MIRRORED.get(sign, sign), left.strip()
    return None
