"""The plain cases: what text and exact arithmetic settle without algebra.

Every function says True, False, or None where mathematics has to decide. All texts are in tidy notation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from hapo_lite.tasks.notation import TEXT, Number, canonical, left_to_do, plain_number
from hapo_lite.tasks.shapes import parse
from hapo_lite.tasks.units import read_quantity, same_compound, scales

CLOSE = Fraction(1, 10**6)
"""How far a decimal may be off, in all and as part of the value: 0.333333 is 1/3, 3.14159 is not pi."""
FEWEST_DIGITS, MANY_DIGITS = 5, 8
"""Significant digits that a decimal must have to stand for a fraction or a root, and those that make it precise."""

_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '\-])*")
_SHORT_WORDS = {"yes", "no", "odd", "all"}
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_NUMBERS = {"e", "i"}
"""Letters that may be a choice and may be a number."""
_BASE = re.compile(r"([\dA-Fa-f]+)_\{?(\d+)\}?")
_RATIO = re.compile(r"([\d.]+)((?: ?: ?[\d.]+)+)", re.ASCII)
_CLOCK = re.compile(r"(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?", re.ASCII)
_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w{1,8}\}?)?=([^=]+)")

_SPACE = re.compile(r"(?<!\d) | (?!\d)")

Algebra = Callable[[str, str, Fraction, Fraction], bool]
"""(gold, answer, factor of the gold, factor of the answer) -> whether gold x factor = answer x factor."""


def settled(answer: str, gold: str) -> bool | None:
    """Whether two tidy texts agree, where that is plain to see."""
    a, g = canonical(answer), canonical(gold)
    if _spaceless(a) == _spaceless(g):
        return True
    number = plain_number(gold)
    if number is not None and (assigned := _ASSIGNED.fullmatch(a)):
        answer = assigned.group(1)
    if (text := _text_gold(gold, g)) is not None and not (g in _NUMBERS and _CHOICE.fullmatch(a) is None):
        return _same_text(a, text, g == text and TEXT.fullmatch(gold) is None)
    if number is not None and left_to_do(answer.rsplit("=", 1)[-1]):
        # An arithmetic task copied into the box is not an answer to it.
        return False
    if parse(gold).kind == "value" == parse(answer).kind:
        return same_value(gold, answer)
    return None


def _spaceless(text: str) -> str:
    """Without spaces, but for those between two digits: 2 1/4 is not 21/4."""
    return _SPACE.sub("", text)


def _text_gold(gold: str, canonical_gold: str) -> str | None:
    """The gold answer's letters where it is words or a choice such as (A), else None."""
    wrapped = TEXT.fullmatch(gold) is not None
    if choice := _CHOICE.fullmatch(canonical_gold):
        return choice.group(1)
    words = _WORDS.fullmatch(canonical_gold)
    long = any(len(w) > 3 for w in canonical_gold.split())
    return canonical_gold if words and (wrapped or canonical_gold.casefold() in _SHORT_WORDS or long) else None


def _same_text(answer: str, gold: str, case_matters: bool) -> bool:
    """Algebra would read letters as a product of variables, in which "seat" equals "east"."""
    if len(gold) > 1:
        return answer.casefold() == gold.casefold()
    choice = _CHOICE.fullmatch(answer)
    said = choice.group(1) if choice else None
    return said is not None and (said == gold if case_matters else said.casefold() == gold.casefold())


def same_value(gold: str, answer: str, algebra: Algebra | None = None) -> bool | None:
    """Whether two single values agree, with their units and words. algebra: decides what is not plain, where given."""
    if canonical(gold) == canonical(answer):
        return True
    if any((shown := TEXT.fullmatch(side)) and _WORDS.fullmatch(shown.group(1).strip()) for side in (gold, answer)):
        return canonical(gold).casefold() == canonical(answer).casefold()
    g, a = read_quantity(gold), read_quantity(answer)
    if len(g.parts) > 1 or len(a.parts) > 1:
        return same_compound(g, a)
    g_value, a_value = g.parts[0][0], a.parts[0][0]
    verdicts = [_same_scaled(g_value, a_value, *factors, algebra) for factors in scales(g, a)]
    return True if True in verdicts else (None if None in verdicts else False)


def _same_scaled(gold: str, answer: str, g: Fraction, a: Fraction, algebra: Algebra | None) -> bool | None:
    gold, answer = _without_one_base(gold, answer)
    if g == a and canonical(gold) == canonical(answer):
        return True
    numbers = plain_number(gold), plain_number(answer)
    if None not in numbers:
        return _same_numbers(numbers[0], numbers[1], g, a)
    bases = [_BASE.fullmatch(canonical(side)) for side in (gold, answer)]
    if all(bases):
        return False
    ratios = _ratio(gold), _ratio(answer)
    if ratios != (None, None):
        clocks = [_CLOCK.fullmatch(side) is not None for side in (gold, answer)]
        proportional = _proportional(*(r or _as_ratio(n) for r, n in zip(ratios, numbers, strict=True)))
        return proportional and not all(clocks) and g == a
    if numbers[0] is not None and left_to_do(answer):
        return False
    return algebra(gold, answer, g, a) if algebra else None


def _without_one_base(gold: str, answer: str) -> tuple[str, str]:
    """52_8 as 52 where the other side names no base."""
    bases = [_BASE.fullmatch(canonical(side)) for side in (gold, answer)]
    if bases[0] and not bases[1]:
        return bases[0][1], answer
    if bases[1] and not bases[0]:
        return gold, bases[1][1]
    return gold, answer


def _same_numbers(gold: Number, answer: Number, g: Fraction, a: Fraction) -> bool:
    x, y = gold.value * g, answer.value * a
    if x == y:
        return True
    if _terminates(x) == _terminates(y):
        return False
    decimal, factor, exact = (gold, g, y) if gold.digits else (answer, a, x)
    return abs(x - y) <= allowed_error(decimal, factor, abs(exact))


def allowed_error(decimal: Number, factor: Fraction, size: Fraction) -> Fraction:
    """How far decimal x factor may be from an exact value of a size: one in its last place, and no more than CLOSE."""
    if decimal.digits < FEWEST_DIGITS:
        return Fraction(0)
    absolute = CLOSE if decimal.digits < MANY_DIGITS else size
    return min(decimal.last * factor, CLOSE * size, absolute)


def _terminates(value: Fraction) -> bool:
    d = value.denominator
    for p in (2, 5):
        while d % p == 0:
            d //= p
    return d == 1


def _ratio(text: str) -> tuple[Fraction, ...] | None:
    if _RATIO.fullmatch(text) is None:
        return None
    numbers = [plain_number(part) for part in text.replace(" ", "").split(":")]
    return None if None in numbers else tuple(number.value for number in numbers)


def _as_ratio(number: Number | None) -> tuple[Fraction, ...] | None:
    return (Fraction(number.value.numerator), Fraction(number.value.denominator)) if number else None


def _proportional(left: tuple[Fraction, ...] | None, right: tuple[Fraction, ...] | None) -> bool:
    if left is None or right is None or len(left) != len(right) or not any(left) or not any(right):
        return False
    return all(x * right[0] == y * left[0] for x, y in zip(left, right, strict=True)) and bool(left[0] and right[0])
