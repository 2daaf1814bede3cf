"""Equality of expressions, decided with sympy's exact objects; imported in a grading process only.

latex2sympy reads an expression. Rational values are compared exactly, others to 200 digits. Expressions in letters
are compared at a score of points, since different elementary expressions do not agree at all of them. Letters under
roots and in logarithms are positive and others have any sign: sqrt(a/b) is sqrt(a)/sqrt(b), but sqrt(x^2) is not x.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, wraps
from typing import ParamSpec

import sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from sympy.core.function import AppliedUndef

from hapo_lite.tasks import plain
from hapo_lite.tasks.comparison import Link, Values
from hapo_lite.tasks.notation import ROW_END, TEXT, plain_number
from hapo_lite.tasks.shapes import Shape

DIGITS = 200
"""Decimal digits to which irrational values are computed. Equal values agree in all but the last ten."""
Sides = ParamSpec("Sides")
Point = dict[sympy.Symbol, sympy.Expr]
"""The value of each letter."""
_POSITIVE = ("3/2", "7/5", "11/9", "8/3", "13/7", "5/8", "17/6", "9/4"), ("2", "3", "5", "4", "7", "6", "9", "8")
_SMALL = ("3/5", "2/7", "1/2", "5/9", "1/3", "4/7", "3/8", "1/5"), ("5", "2", "3", "7", "1", "4", "6", "11")
_SIGNED = (
    ("-3/2", "7/5", "-11/9", "8/3", "-5/4", "2/3", "-9/7", "1/2"),
    ("-2", "-3", "-5", "-4", "-7", "-6", "-1", "-8"),
)
_MORE = tuple(tuple(str(7 * i + 3 * j + 1) for j in range(8)) for i in range(6))
"""Further points for step functions, which may agree over whole stretches."""
_STEPS = (sympy.floor, sympy.ceiling, sympy.Abs, sympy.Mod, sympy.sign, sympy.Max, sympy.Min, sympy.Piecewise)

_PREPARED: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(re.escape(ROW_END)), r"\\\\ "),
    (re.compile(r"\\text\s*\{\s*(\w)\s*\}"), r" \1 "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\*"), r"\\cdot "),
    (
        re.compile(r"(?<![\\a-zA-Z])(arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi)(?![a-zA-Z])"),
        r"\\\1",
    ),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"\^\s*([+-]\s*(?:\d+|[a-zA-Z]))"), r"^{\1}"),
    (re.compile(r"\\(?:lg)(?![a-zA-Z])"), r"\\log_{10}"),
    (re.compile(r"\^\s*\{?\s*(?:\\top|\\intercal|\\text\{T\}|T)\s*\}?(?![a-zA-Z])"), r"_{transposed}"),
    (re.compile(r"([a-zA-Z])('+|\^\{\\prime(?:\\prime)*\}|\^\\prime)"), lambda m: f"{m[1]}_{{prime{_primes(m[2])}}}"),
    (re.compile(r"((?:\d+(?:\.\d+)?)|[a-zA-Z]|\))\s*\^\{\\circ\}"), r"(\1 \\cdot \\frac{\\pi}{180})"),
    (
        re.compile(r"(?<![\d.^_{])(\d+) ?\\frac\{(\d+)\}\{(\d+)\}"),
        lambda m: _mixed(m, rf"({m[1]}+\frac{{{m[2]}}}{{{m[3]}}})"),
    ),
    (re.compile(r"(?<![\d.^_])(\d+) (\d+)/(\d+)(?!\d)"), lambda m: _mixed(m, rf"({m[1]}+\frac{{{m[2]}}}{{{m[3]}}})")),
    (re.compile(r"(?<![\d.])\.(?=\d)"), "0."),
]

_COMMAND = re.compile(r"\\[a-zA-Z]+")
_TWO_NUMBERS = re.compile(r"(?<![\d._^])\d+(?:\.\d+)? \d")
"""Two numbers with only a space between them are not a product."""


def _primes(sign: str) -> int:
    return sign.count("'") or sign.count("prime")


def _mixed(match: re.Match[str], mixed: str) -> str:
    return mixed if int(match[2]) < int(match[3]) else match[0]


@lru_cache(maxsize=8192)
def expression(text: str, cases_differ: bool = False) -> sympy.Basic | sympy.MatrixBase | None:
    """The value of an expression in tidy notation; None where the expression cannot be read.

    cases_differ: whether R and r are two letters.
    """
    number = plain_number(text)
    if number is not None:
        return sympy.Rational(number.value.numerator, number.value.denominator)
    for pattern, replacement in _PREPARED:
        text = pattern.sub(replacement, text)
    words = TEXT.findall(text.replace(r"\operatorname", ""))
    if _TWO_NUMBERS.search(text) or any(len(word.strip()) > 1 for word in words):
        return None
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=not cases_differ)
    try:
        read = latex2sympy(text, normalization_config=None, conversion_config=config)
    except MemoryError:
        raise
    except Exception:
        return None
    return _settled(read) if isinstance(read, (sympy.Basic, sympy.MatrixBase)) else None


def _cases_differ(*answers: str) -> bool:
    """Whether upper and lower case are different letters in these answers: otherwise R^2 may be r^2.

    They are where one answer uses a letter in both cases, or a current I or field E.
    """
    letters = [set(_COMMAND.sub("", answer)) for answer in answers]
    return any(c in "IE" or (c.islower() and c.upper() in found) for found in letters for c in found)


def _settled(read: sympy.Basic | sympy.MatrixBase) -> sympy.Basic | sympy.MatrixBase:
    """The expression evaluated, its decimals made exact.

    Letters carry no assumptions, i is the imaginary unit, and derivatives and unknown functions count as letters.
    """
    if isinstance(read, sympy.MatrixExpr):
        read = read.doit().as_explicit()
    if isinstance(read, sympy.MatrixBase):
        return read.applyfunc(_settled).as_immutable()
    opaque = {d: sympy.Symbol(str(d)) for d in read.atoms(sympy.Derivative, AppliedUndef)}
    read = read.xreplace(opaque)
    bound = {v for s in read.atoms(sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit) for v in _bound_by(s)}
    names = {s: sympy.Symbol(s.name) for s in read.free_symbols | bound}
    names |= {s: sympy.I for s in read.free_symbols - bound if s.name == "i" and not any(v.name == "i" for v in bound)}
    names |= {f: sympy.Rational(str(f)) for f in read.atoms(sympy.Float)}
    names |= {u: u.args[0] for u in read.atoms(sympy.UnevaluatedExpr)}
    return read.xreplace(names).doit()


def _bound_by(expression: sympy.Basic) -> list[sympy.Symbol]:
    """The letters that a sum, product, integral or limit runs over."""
    return [expression.args[1]] if isinstance(expression, sympy.Limit) else [limit[0] for limit in expression.limits]


def same_expression(gold: str, answer: str, g: Fraction = Fraction(1), a: Fraction = Fraction(1)) -> bool:
    """Whether gold x g = answer x a."""
    differ = _cases_differ(gold, answer)
    x, y = expression(gold, differ), expression(answer, differ)
    if x is None or y is None:
        return False
    if isinstance(x, sympy.MatrixBase) or isinstance(y, sympy.MatrixBase):
        return g == a and isinstance(x, sympy.MatrixBase) and isinstance(y, sympy.MatrixBase) and _same_matrices(x, y)
    if not isinstance(x, sympy.Expr) or not isinstance(y, sympy.Expr):
        return g == a and x == y
    x, y = sympy.Rational(g.numerator, g.denominator) * x, sympy.Rational(a.numerator, a.denominator) * y
    if not x.free_symbols and not y.free_symbols:
        approximate = _approximates(gold, answer, x, y, g, a)
        if approximate is not None:
            return approximate
    return equal(x, y)


def _same_matrices(x: sympy.MatrixBase, y: sympy.MatrixBase) -> bool:
    return x.shape == y.shape and all(equal(p, q) for p, q in zip(x.flat(), y.flat(), strict=True))


def _approximates(gold: str, answer: str, x: sympy.Expr, y: sympy.Expr, g: Fraction, a: Fraction) -> bool | None:
    """Whether a decimal of enough digits is the other value rounded; None where no side is a decimal."""
    numbers = plain_number(gold), plain_number(answer)
    decimals = [(n, factor) for n, factor in zip(numbers, (g, a), strict=True) if n is not None and n.digits]
    if len(decimals) != 1 or equal(x, y):
        return None
    number, factor = decimals[0]
    exact = y if numbers[0] is number else x
    difference, size = sympy.Abs((x - y).evalf(40)), sympy.Abs(exact.evalf(40))
    if not (difference.is_comparable and size.is_comparable):
        return False
    allowed = plain.allowed_error(number, factor, Fraction(str(size)))
    return bool(difference <= sympy.Rational(allowed.numerator, allowed.denominator))


def equal(x: sympy.Expr, y: sympy.Expr) -> bool:
    """Whether two expressions have the same value wherever both are defined."""
    if x == y:
        return x.is_finite is not None or not x.has(sympy.nan, sympy.zoo)
    letters = sorted(x.free_symbols | y.free_symbols, key=str)
    if not letters:
        return same_numbers(x, y) is True
    bare = [not _roots(side) for side in (x, y)]
    signs_matter = any(bare) or x.has(sympy.Abs) or y.has(sympy.Abs)
    agreed = 0
    for point, positive in _points(letters, x.has(*_STEPS) or y.has(*_STEPS)):
        if not positive and not signs_matter:
            continue
        defined = [positive or _is_real_at(side, point) for side in (x, y)]
        if not all(defined):
            if any(defined) and x.has(sympy.Abs) != y.has(sympy.Abs):
                return False  # ln|x| is more than ln x
            continue
        verdict = same_numbers(x.xreplace(point).doit(), y.xreplace(point).doit(), real_only=not positive)
        if verdict is False:
            return False
        if verdict:
            agreed += 1
    return agreed >= 3


def _roots(x: sympy.Expr) -> list[sympy.Expr]:
    """The arguments with letters of all roots and logarithms in an expression."""
    roots = [power.base for power in x.atoms(sympy.Pow) if not power.exp.is_integer and power.base.free_symbols]
    return roots + [log.args[0] for log in x.atoms(sympy.log) if log.args[0].free_symbols]


def _is_real_at(x: sympy.Expr, point: Point) -> bool:
    """Whether every root and logarithm in an expression has a positive argument at a point, as in real analysis."""
    return all(argument.xreplace(point).evalf(15).is_positive for argument in _roots(x))


def _points(letters: list[sympy.Symbol], steps: bool) -> Iterator[tuple[Point, bool]]:
    """The points at which expressions are compared, each with whether all its values are positive.

    steps: whether the expressions have step functions. Letters beyond the eighth get values of their own too.
    """
    rows: list[tuple[tuple[str, ...], bool]] = [(row, True) for row in (*_POSITIVE, *_SMALL)]
    if steps:
        rows += [(row, True) for row in _MORE]
    rows += [(row, False) for row in _SIGNED]
    for row, positive in rows:
        yield {s: sympy.Rational(row[i % 8]) + 10 * (i // 8) for i, s in enumerate(letters)}, positive


def same_numbers(x: sympy.Expr, y: sympy.Expr, real_only: bool = False) -> bool | None:
    """Whether two values are equal; None where one is undefined, or, with real_only, not real."""
    if x.is_Rational and y.is_Rational:
        return x == y
    if x.has(sympy.zoo, sympy.nan) or y.has(sympy.zoo, sympy.nan):
        return None
    if x.is_infinite or y.is_infinite:
        return x == y
    values = [v.evalf(DIGITS, maxn=4 * DIGITS) for v in (x, y)]
    if not all((v.is_number and v.is_comparable) or _is_complex(v) for v in values):
        return None
    parts = [v.as_real_imag() for v in values]
    scale = max(abs(part) for value in parts for part in value)
    smallest = scale * sympy.Float(10, DIGITS) ** (10 - DIGITS)
    if real_only and any(abs(imaginary) > smallest for _, imaginary in parts):
        return None
    return all(abs(p - q) <= smallest for p, q in zip(*parts, strict=True))


def _is_complex(value: sympy.Expr) -> bool:
    return all(part.is_Float or part.is_Rational for part in value.as_real_imag())


def _difference(left: str, right: str, cases_differ: bool) -> sympy.Expr | None:
    """left - right; None where one side cannot be read, or where the difference has no letters."""
    x, y = expression(left, cases_differ), expression(right, cases_differ)
    if not isinstance(x, sympy.Expr) or not isinstance(y, sympy.Expr):
        return None
    difference = x - y
    return difference if difference.free_symbols else None


def _ratio(x: sympy.Expr, y: sympy.Expr) -> sympy.Expr | None:
    """The constant number x / y; None where x / y is not constant or not a number."""
    letters = sorted(x.free_symbols | y.free_symbols, key=str)
    ratios: list[sympy.Expr] = []
    for point, _ in _points(letters, True):
        at = [side.xreplace(point).doit() for side in (x, y)]
        if same_numbers(at[0], sympy.Integer(0)) or same_numbers(at[1], sympy.Integer(0)):
            if same_numbers(*at) is False:
                return None
            continue
        ratios.append(at[0] / at[1])
        if same_numbers(ratios[0], ratios[-1]) is False:
            return None
    return ratios[0] if len(ratios) >= 3 and ratios[0].is_number else None


def same_equation(gold: tuple[str, str], answer: tuple[str, str]) -> bool:
    """Whether left - right of one is a constant times that of the other."""
    differ = _cases_differ("=".join(gold), "=".join(answer))
    x, y = _difference(*gold, differ), _difference(*answer, differ)
    return x is not None and y is not None and _ratio(x, y) is not None


def same_inequality(gold: Link, answer: Link) -> bool:
    """Whether left - right of one is a constant times that of the other, and the sign agrees with the constant's.

    A positive constant keeps the sign of the inequality, a negative one turns it round.
    """
    differ = _cases_differ("".join(gold), "".join(answer))
    x, y = _difference(gold.left, gold.right, differ), _difference(answer.left, answer.right, differ)
    ratio = _ratio(x, y) if x is not None and y is not None else None
    if ratio is None or ratio.is_real is False:
        return False
    sign = gold.sign if ratio.is_negative is False else gold.mirrored().sign
    return sign == answer.sign


def same_set(gold: Shape, answer: Shape) -> bool:
    """Whether two sets of numbers have the same members: [1,2] and [2,3] together are [1,3]."""
    if gold.kind == "inequality" == answer.kind and _letters(gold) != _letters(answer):
        return False
    gold_set, answer_set = _as_set(gold), _as_set(answer)
    return gold_set is not None and answer_set is not None and gold_set == answer_set


def _letters(shape: Shape) -> set[str]:
    sides = [expression(part.text) for part in shape.parts]
    return {letter.name for side in sides if side is not None for letter in side.free_symbols}


def _as_set(shape: Shape) -> sympy.Set | None:
    """The set of numbers that a shape stands for; None where it stands for none."""
    if shape.kind == "union":
        parts = [_as_set(part) for part in shape.parts]
        return None if None in parts else sympy.Union(*parts)
    if shape.kind == "inequality":
        return _solutions(shape)
    if shape.kind == "value":
        read = expression(shape.text)
        return read if isinstance(read, sympy.Set) else None
    members = _numbers(shape)
    if members is None:
        return None
    if shape.kind == "set":
        return sympy.FiniteSet(*members)
    if shape.kind == "point" and len(members) == 2 and all(end.is_extended_real for end in members):
        return sympy.Interval(*members, shape.brackets[0] == "(", shape.brackets[1] == ")")
    return None


def _numbers(shape: Shape) -> list[sympy.Expr] | None:
    """The parts of a shape where all of them are numbers, else None."""
    found = []
    for part in shape.parts:
        number = expression(part.text) if part.kind == "value" else None
        if not isinstance(number, sympy.Expr) or not number.is_number:
            return None
        found.append(number)
    return found


def _solutions(shape: Shape) -> sympy.Set | None:
    """The real solutions of an inequality in one letter."""
    relations = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "!=": sympy.Ne}
    sides = [side for side in (expression(part.text) for part in shape.parts) if isinstance(side, sympy.Expr)]
    letters = {letter for side in sides for letter in side.free_symbols}
    if len(sides) != len(shape.parts) or len(letters) != 1:
        return None
    real = {letters.pop(): sympy.Symbol("x", real=True)}
    sides = [side.subs(real) for side in sides]
    links = zip(sides, shape.signs, sides[1:], strict=False)
    try:
        return sympy.Intersection(*(relations[sign](left, right).as_set() for left, sign, right in links))
    except (NotImplementedError, KeyError, TypeError, ValueError, AttributeError):
        return None


def same_value(gold: str, answer: str) -> bool:
    """Whether two values agree, with their units and words, plain or not."""
    return plain.same_value(gold, answer, same_expression) is True


def _false_where_undecided(compare: Callable[Sides, bool]) -> Callable[Sides, bool]:
    """`compare`, which answers False where sympy raises one of its many errors about expressions without a meaning."""

    @wraps(compare)
    def compared(*sides: Sides.args, **options: Sides.kwargs) -> bool:
        try:
            return compare(*sides, **options)
        except MemoryError:
            raise
        except Exception:
            return False

    return compared


VALUES = Values(
    same_value=_false_where_undecided(same_value),
    same_equation=_false_where_undecided(same_equation),
    same_inequality=_false_where_undecided(same_inequality),
    same_set=_false_where_undecided(same_set),
)
