"""The shape of an answer, such as a list, point, set or equation, read from the brackets, commas and signs of its text.

All texts are in tidy notation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from hapo_lite.tasks.notation import canonical
from hapo_lite.tasks.units import is_compound

MOST_PARTS = 100
"""Most parts of a list, point or matrix that are compared one by one; longer ones are compared as text."""


@dataclass(frozen=True)
class Shape:
    """One answer or a part of it. text: its own text; brackets, signs, names: where the kind has them.

    kind: "value", without parts; "list", without an order; "point", with an order and brackets, so an interval too;
    "set" and "union", without an order; "matrix", whose rows are points; "equation" and "inequality", the sides with
    the signs between them; "record", values by name; "residue", values and then the modulus.
    """

    kind: str
    text: str
    parts: tuple[Shape, ...] = ()
    brackets: str = ""
    signs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


_OPENING, _CLOSING = {"(", "[", "{", "\\{"}, {")", "]", "}", "\\}"}
_TOKENS = re.compile(r"\\(?:begin|end)\s*\{(\w+)\*?\}|\\text\s*\{[^{}]*\}|\\[a-zA-Z]+|\\.|[^\\]", re.DOTALL)
_ENVIRONMENT = re.compile(r"\\begin\s*\{(\w+)\*?\}(?:\s*\{[lcr| ]*\})?(.*)\\end\s*\{\1\*?\}", re.DOTALL)
_MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "smallmatrix", "array", "psmallmatrix", "bsmallmatrix"}
_SYSTEMS = {"cases", "aligned", "align", "gathered", "dcases", "rcases"}
_CONDITION = re.compile(r"\\text\s*\{\s*(?:if|for|when|where)\s*\}")
_STRONG = re.compile(
    r";|\\text\s*\{[\s,]*(?:and|or)\s*\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])"
    r"(?!\s*(?:more|less|fewer|greater|higher|lower|above|below|over|under|better|later|earlier|so)\b)"
)
_OUTWARD = re.compile(r"(?<![\d)}])([\[\]])([^\[\](),;]+[,;][^\[\](),;]+)([\[\]])")
_COMMA_GROUPS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_REAL_SUCH_THAT = re.compile(r"\s*[a-zA-Z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![a-zA-Z])|\||:)")
r"""The head of \{x \mid x>3\}, whose members are real numbers."""
_SIGNS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\in": "in", r"\approx": "~"}
_MODULUS = re.compile(r"^(.*?)\s*\(?\s*\\pmod\s*(\{[^{}]*\}|\S+?)\s*\)?$", re.DOTALL)
_SUBSCRIPTS = re.compile(r"_(?:\{[^{}]*\}|\w)|\\text\s*\{[^{}]*\}|\\[a-zA-Z]+|'|\([^()]*\)")
_NAME_LEFT = re.compile(r"[A-Za-z\s{}|:/()\[\]]*")
_NO_NAMES = re.compile(r"\\(?:pm|mp|cdot|times|div|sqrt|cup|cap|infty|pi|sum|int|sin|cos|tan|log|ln)(?![a-zA-Z])")


def parse(text: str) -> Shape:
    """The shape of a tidy text."""
    text = _OUTWARD.sub(_turned_inward, _unwrapped(text.strip()))
    if is_compound(text):
        return Shape("value", text)
    modulus = _MODULUS.match(text)
    if modulus is not None and r"\pmod" not in modulus[1]:
        *names, residues = re.split(r"\\equiv(?![a-zA-Z])", modulus[1])
        if not all(is_name(name) for name in names):
            return Shape("value", text)
        return Shape("residue", text, (parse(residues), Shape("value", modulus[2].strip("{}"))))
    items = [expanded for item in _items(text) for expanded in _signed(item)]
    if len(items) != 1:
        return _grouped(text, [_item(item) for item in items])
    return _item(items[0])


def _turned_inward(interval: re.Match[str]) -> str:
    """The interval ]a,b[ written as (a,b)."""
    opening, ends, closing = interval.groups()
    return f"{'[' if opening == '[' else '('}{ends}{']' if closing == ']' else ')'}"


def is_name(text: str) -> bool:
    """Whether a text only names something: x, x_{12}, f(x), (m,n), AB, |AB|, A:B, \\frac{NO}{BO}; not x+y or 2x."""
    text = text.strip()
    return bool(text) and not _NO_NAMES.search(text) and _NAME_LEFT.fullmatch(_SUBSCRIPTS.sub("", text)) is not None


def _unwrapped(text: str) -> str:
    """The text without braces around the whole, unless a comma makes them a set typed without backslashes."""
    while text.startswith("{") and _end_of_group(text) == len(text) and len(_split(text[1:-1], ",")) == 1:
        text = text[1:-1].strip()
    return text


class _Token(NamedTuple):
    """A token of a formula, where it starts, and how many brackets are open around it."""

    text: str
    start: int
    depth: int


def _tokens(text: str) -> list[_Token]:
    """The tokens of a text; closing brackets without a partner leave the depth at 0."""
    found = []
    depth = 0
    for match in _TOKENS.finditer(text):
        token = match.group()
        if token in _CLOSING or token.startswith(r"\end"):
            depth = max(0, depth - 1)
        found.append(_Token(token, match.start(), depth))
        if token in _OPENING or token.startswith(r"\begin"):
            depth += 1
    return found


def _end_of_group(text: str) -> int:
    """The position behind the bracket that closes the first one of a text; 0 where none does."""
    for token, start, depth in _tokens(text)[1:]:
        if depth == 0:
            return start + len(token) if token in _CLOSING else 0
    return 0


def _split(text: str, separator: str) -> list[str]:
    """The parts of a text between the separators that stand in no bracket."""
    parts = []
    last = 0
    for token, start, depth in _tokens(text):
        if token == separator and depth == 0:
            parts.append(text[last:start])
            last = start + len(token)
    return [part.strip() for part in (*parts, text[last:])]


def _split_by_either(text: str) -> list[str]:
    """The parts between commas, or between semicolons where there are no commas: (1;2) is (1,2)."""
    parts = _split(text, ",")
    return parts if len(parts) > 1 else _split(text, ";")


def _items(text: str) -> list[str]:
    """The items of a list without brackets: parted by commas, semicolons, "and" and "or". 3,400 is one number."""
    depth_at = {start: depth for _, start, depth in _tokens(text)}
    pieces = []
    last = 0
    for match in _STRONG.finditer(text):
        if depth_at.get(match.start(), 1) == 0:
            pieces.append(text[last : match.start()])
            last = match.end()
    pieces.append(text[last:])
    items = []
    for piece in pieces:
        held = _COMMA_GROUPS.sub(lambda m: m[0].replace(",", "\x1f"), piece)
        items += [part.replace("\x1f", ",") for part in _split(held, ",")]
    return [part for item in items if item for part in _adjacent(item)]


def _adjacent(item: str) -> list[str]:
    """The points of an item that has no comma between them: (1,2)(3,4) is two points, (a+1)(b+2) is one product."""
    if not item.startswith("(") or ")" not in item[:-1]:
        return [item]
    points = []
    last = 0
    for token, start, depth in _tokens(item):
        if depth or token.isspace():
            continue
        if token == ")" and "," in item[last:start]:
            points.append(item[last : start + 1].strip())
            last = start + 1
        elif token != "(":
            return [item]
    return points if len(points) > 1 and last == len(item) else [item]


def _signed(item: str) -> list[str]:
    r"""One text for each choice of the signs of \pm. With an \mp, all \pm have the same sign and it the opposite."""
    count = len(re.findall(r"\\pm(?![a-zA-Z])", item))
    if not 1 <= count <= 4 or "\\{" in item:
        return [item]  # the members of a set get their signs one by one
    if r"\mp" in item:
        choices = ["+" * count, "-" * count]
    else:
        choices = ["".join(signs) for signs in product("+-", repeat=count)]
    return [_with_signs(item, signs) for signs in choices]


def _with_signs(item: str, signs: str) -> str:
    r"""The item with `signs` in place of every \pm, in their order, and the opposite of the first for every \mp."""
    remaining = iter(signs)
    signed = re.sub(r"\\pm(?![a-zA-Z])", lambda _: next(remaining), item)
    signed = re.sub(r"\\mp(?![a-zA-Z])", "-" if signs[0] == "+" else "+", signed)
    return re.sub(r"(^|[=(,\[{])\s*\+", r"\1", signed)


def _item(text: str) -> Shape:
    text = _unwrapped(text.strip())
    environment = _ENVIRONMENT.fullmatch(_without_fence(text))
    if environment and environment[1] in _MATRICES | _SYSTEMS and r"\begin" not in environment[2]:
        return _table(text, environment[1], environment[2])
    relation = _relation(text)
    if relation is not None:
        return relation
    parts = _split(text, r"\cup")
    if len(parts) > 1:
        return Shape("union", text, tuple(_item(part) for part in parts))
    opening = next((b for b in ("\\{", "{", "(", "[") if text.startswith(b)), None)
    if opening and _end_of_group(text) == len(text):
        return _bracketed(text, opening)
    return Shape("value", text)


def _bracketed(text: str, opening: str) -> Shape:
    closing = text[-2:] if text.endswith("\\}") else text[-1]
    inner = text[len(opening) : len(text) - len(closing)]
    if opening in ("\\{", "{"):
        items = [signed for item in _split_by_either(inner) if item for signed in _signed(item)]
        if len(items) == 1 and re.search(r"\\mid(?![a-zA-Z])|\||:", items[0]):
            condition = _REAL_SUCH_THAT.match(items[0])
            shape = parse(items[0][condition.end() :]) if condition is not None else None
            return shape if shape is not None and shape.kind == "inequality" else Shape("value", text)
        # Braces without backslashes are invisible in LaTeX.
        return Shape("set" if opening == "\\{" else "list", text, tuple(_item(item) for item in items))
    items = _split_by_either(inner)
    if len(items) == 1:
        # Brackets around one value: [3] is a list of it, (3) is the value.
        return _item(inner) if opening == "(" and closing == ")" else Shape("value", text)
    return Shape("point", text, tuple(_item(item) for item in items), brackets=opening + closing)


def _without_fence(text: str) -> str:
    r"""The text of [\begin{array}...\end{array}] without its brackets. Bars stay: they make a determinant."""
    fenced = re.fullmatch(r"(?:\(|\[|\\\{)\s*(\\begin.*\\end\s*\{\w+\*?\})\s*(?:\)|\]|\\\}|)", text, re.DOTALL)
    return fenced[1] if fenced else text


def _table(text: str, name: str, body: str) -> Shape:
    rows = [row for row in (r.strip() for r in _split(body.replace(r"\hline", ""), r"\cr")) if row]
    if name in _SYSTEMS and (name not in ("cases", "dcases", "rcases") or "&" not in body):
        return parse(", ".join(row.replace("&", "").strip(" ,") for row in rows))
    kind = "matrix" if name in _MATRICES else "set"
    rows = [_CONDITION.sub(" ", row) for row in rows] if kind == "set" else rows
    cells = [Shape("point", row, tuple(_item(cell.rstrip(" ,")) for cell in _split(row, "&")), "()") for row in rows]
    return Shape(kind, text, tuple(cells), brackets="cases" if kind == "set" else "")


def _relation(text: str) -> Shape | None:
    """An equation or inequality, which is a chain where it has several signs; None where there is no sign."""
    sides: list[str] = []
    signs: list[str] = []
    last = 0
    for token, start, depth in _tokens(text):
        if depth == 0 and token in _SIGNS:
            sides.append(text[last:start])
            signs.append(_SIGNS[token])
            last = start + len(token)
    if not signs:
        return None
    sides.append(text[last:])
    if "~" in signs[1:]:
        # "1/3 = 0.33..." to so many digits: the exact value counts.
        cut = signs.index("~", 1)
        sides, signs = sides[: cut + 1], signs[:cut]
    elif signs[0] == "~" and len(signs) == 1 and not is_name(sides[0]):
        return _item(sides[0].strip() or sides[1])
    if signs[0] == "in" and len(signs) == 1 and is_name(sides[0]):
        inner = parse(sides[1])
        return Shape(inner.kind, text, inner.parts, inner.brackets, inner.signs, inner.names)
    equal = all(sign in "=~" for sign in signs)
    parts = [parse(side) if equal else Shape("value", side.strip()) for side in sides]
    return Shape("equation" if equal else "inequality", text, tuple(parts), signs=tuple(signs))


def _grouped(text: str, items: list[Shape]) -> Shape:
    """The shape of several items: a list; a record, if they name values; a list of records, if names come again."""
    if not items or len(items) > MOST_PARTS:
        return Shape("value", text)
    named = [assigned(item) for item in items]
    first = named[0]
    if first is not None and not any(named[1:]) and all(item.kind == "value" for item in items[1:]):
        return Shape("list", text, (first[1], *items[1:]), names=(first[0],))
    if all(item.kind == "inequality" for item in items):
        return Shape("list", text, tuple(items), signs=("or",) if re.search(r"\bor\b", text) else ("and",))
    values = [pair for pair in named if pair is not None]
    if len(values) < len(items) or all(item.parts[0].kind == "point" for item in items):
        return Shape("list", text, tuple(items))
    records: list[dict[str, Shape]] = [{}]
    for name, value in values:
        if name in records[-1]:
            records.append({})
        records[-1][name] = value
    shapes = tuple(record(tuple(r), tuple(r.values())) for r in records)
    if all(len(r) == 1 for r in records):
        return Shape("list", text, tuple(r.parts[0] for r in shapes), names=shapes[0].names)
    return shapes[0] if len(shapes) == 1 else Shape("list", text, shapes)


def record(names: tuple[str, ...], values: tuple[Shape, ...]) -> Shape:
    """The record of these names and their values."""
    text = ", ".join(f"{name}={value.text}" for name, value in zip(names, values, strict=True))
    return Shape("record", text, values, names=names)


def assigned(item: Shape) -> tuple[str, Shape] | None:
    """(name, value) of an equation such as x=3; None for a shape that gives no name a value."""
    if item.kind != "equation":
        return None
    first, last = item.parts[0], item.parts[-1]
    if not is_name(first.text) and len(item.parts) == 2 and is_name(last.text):
        first, last = last, first  # 3=x
    if not is_name(first.text):
        return None
    return canonical(first.text.strip()).replace(" ", ""), last
