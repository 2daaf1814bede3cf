"""The plain cases: what text and exact arithmetic settle without algebra.

A verdict is True, False, or None where algebra has to decide. All texts are in tidy notation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from hapo_lite.tasks.notation import (
    TEXT,
    Number,
    canonical,
    function_left_to_do,
    left_to_do,
    nested_too_deep,
    plain_number,
)
from hapo_lite.tasks.shapes import parse
from hapo_lite.tasks.units import read_quantity, same_compound, scales

CLOSE = Fraction(1, 10**6)
"""Largest absolute and relative error of a decimal: 0.333333 is 1/3, 3.14159 is not pi."""
FEWEST_DIGITS, MANY_DIGITS = 5, 8
"""Significant digits that a decimal must have to stand for a fraction or a root, and those that make it precise."""

_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[ '\-])*")
_SHORT_WORDS = {"yes", "no", "odd", "all"}
_CODE = re.compile(r"[A-Z]{3,}|[A-Z]+\d+[A-Z\d]*")
_NAME = re.compile(r"[A-Z][a-z]{2,}")
_DATE_OR_SCORE = re.compile(r"\d+(?:-\d+)+|\d+/\d+/\d+|\d+(?:\.\d+){2,}", re.ASCII)
"""Digits joined by dashes or slashes, which as a gold answer are no sum or quotient: 2024-01-15, 3-2, 555-1234."""
_DASHES = str.maketrans("–—‐‑‒", "-----")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?")
_NUMBERS = {"e", "i"}
"""Letters that are a choice in some answers and a number in others."""
_BASE = re.compile(r"([\dA-Fa-f]+)_\{?(\d+)\}?")
_RATIO = re.compile(r"([\d.]+)((?: ?: ?[\d.]+)+)", re.ASCII)
_CLOCK = re.compile(r"(?:[01]?\d|2[0-4]):[0-5]\d(?::[0-5]\d)?", re.ASCII)
_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w{1,8}\}?)?=([^=]+)")

_SPACE = re.compile(r"(?<!\d) | (?!\d)")

Algebra = Callable[[str, str, Fraction, Fraction], bool]
"""(gold, answer, factor of the gold, factor of the answer) -> whether gold x factor = answer x factor."""


def settled(answer: str, gold: str) -> bool | None:
    """Whether two tidy texts agree; None where algebra has to decide."""
    a, g = canonical(answer), canonical(gold)
    if _spaceless(a) == _spaceless(g):
        return True
    if nested_too_deep(answer) or nested_too_deep(gold):
        return False
    dashed = _spaceless(g).translate(_DASHES)
    if _DATE_OR_SCORE.fullmatch(dashed):
        return _spaceless(a).translate(_DASHES) == dashed
    number = plain_number(gold)
    assigned = _ASSIGNED.fullmatch(a)
    if number is not None and assigned is not None:
        answer = assigned.group(1)
    text = _text_gold(gold, g)
    may_be_number = g in _NUMBERS and _CHOICE.fullmatch(a) is None
    if text is not None and not may_be_number:
        return _same_text(a, text, case_matters=g == text and TEXT.fullmatch(gold) is None)
    last = answer.rsplit("=", 1)[-1]
    if number is not None and plain_number(last.strip()) is None and left_to_do(last):
        # An arithmetic task copied into the box is not an answer to it.
        return False
    if parse(gold).kind == "value" == parse(answer).kind:
        return same_value(gold, answer)
    return None


def _spaceless(text: str) -> str:
    """The text without its spaces, except those between two digits: 2 1/4 is not 21/4."""
    return _SPACE.sub("", text)


def _text_gold(gold: str, canonical_gold: str) -> str | None:
    """The gold answer's letters where it is words or a choice such as (A), else None."""
    choice = _CHOICE.fullmatch(canonical_gold)
    if choice is not None:
        return choice.group(1)
    wrapped = TEXT.fullmatch(gold) is not None and _WORDS.fullmatch(canonical_gold) is not None
    return canonical_gold if wrapped or _is_word_or_code(canonical_gold) else None


def _is_word_or_code(text: str) -> bool:
    """Whether letters without an operator are words or a code: "east", "SAS", "CO2", not the product "abc"."""
    if _CODE.fullmatch(text) is not None:
        return True
    if _WORDS.fullmatch(text) is None:
        return False
    return text.casefold() in _SHORT_WORDS or any(len(w) > 3 or _NAME.fullmatch(w) for w in text.split())


def _same_text(answer: str, gold: str, case_matters: bool) -> bool:
    """Whether two texts agree letter by letter: algebra would read "seat" as a product that equals "east"."""
    if len(gold) > 1:
        return answer.casefold() == gold.casefold()
    choice = _CHOICE.fullmatch(answer)
    said = choice.group(1) if choice else None
    return said is not None and (said == gold if case_matters else said.casefold() == gold.casefold())


def same_value(gold: str, answer: str, algebra: Algebra | None = None) -> bool | None:
    """Whether two single values agree, with their units and words. algebra: decides the cases that are not plain."""
    if canonical(gold) == canonical(answer):
        return True
    if _is_words(gold) or _is_words(answer):
        return canonical(gold).casefold() == canonical(answer).casefold()
    g, a = read_quantity(gold), read_quantity(answer)
    if len(g.parts) > 1 or len(a.parts) > 1:
        return same_compound(g, a)
    g_value, a_value = g.parts[0].value, a.parts[0].value
    verdicts = [_same_scaled(g_value, a_value, *factors, algebra) for factors in scales(g, a)]
    if True in verdicts:
        return True
    return None if None in verdicts else False


def _is_words(text: str) -> bool:
    """Whether a whole text is words or a code, such as \\text{odd}, HTH or A3."""
    shown = TEXT.fullmatch(text)
    if shown is not None and _WORDS.fullmatch(shown.group(1).strip()) is not None:
        return True
    return _is_word_or_code(canonical(text))


def _same_scaled(gold: str, answer: str, g: Fraction, a: Fraction, algebra: Algebra | None) -> bool | None:
    gold = _without_base(gold, answer)
    if g == a and canonical(gold) == canonical(answer):
        return True
    gold_number, answer_number = plain_number(gold), plain_number(answer)
    if gold_number is not None and answer_number is not None:
        return _same_numbers(gold_number, answer_number, g, a)
    if _BASE.fullmatch(canonical(answer)):
        return False
    gold_ratio, answer_ratio = _ratio(gold), _ratio(answer)
    if gold_ratio is not None or answer_ratio is not None:
        gold_clock, answer_clock = _CLOCK.fullmatch(gold) is not None, _CLOCK.fullmatch(answer) is not None
        if gold_clock and answer_clock:
            return gold_ratio == answer_ratio
        # 12:30 is a time, and no two fifths.
        if (gold_clock and answer_number is not None) or (answer_clock and gold_number is not None):
            return False
        terms = gold_ratio or _as_ratio(gold_number), answer_ratio or _as_ratio(answer_number)
        return _proportional(*terms) and g == a
    if gold_number is not None and left_to_do(answer):
        return False
    # A root or logarithm may stand for a decimal that rounds it.
    if gold_number is not None and gold_number.digits < FEWEST_DIGITS and function_left_to_do(answer):
        return False
    return algebra(gold, answer, g, a) if algebra else None


def _without_base(gold: str, answer: str) -> str:
    """The gold answer, 52_8 as 52 where the answer names no base. An answer's base is never left out: 52_8 is 42."""
    base = _BASE.fullmatch(canonical(gold))
    return base[1] if base is not None and _BASE.fullmatch(canonical(answer)) is None else gold


def _same_numbers(gold: Number, answer: Number, g: Fraction, a: Fraction) -> bool:
    x, y = gold.value * g, answer.value * a
    if x == y:
        return True
    if _terminates(x) == _terminates(y):
        return False
    decimal, factor, exact = (gold, g, y) if gold.digits else (answer, a, x)
    return abs(x - y) <= allowed_error(decimal, factor, abs(exact))


def allowed_error(decimal: Number, factor: Fraction, size: Fraction) -> Fraction:
    """Largest distance of decimal x factor from an exact value of a size: 1 in the last place, and at most CLOSE."""
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
    terms = text.replace(" ", "").split(":")
    numbers = [number for number in (plain_number(term) for term in terms) if number is not None]
    return tuple(number.value for number in numbers) if len(numbers) == len(terms) else None


def _as_ratio(number: Number | None) -> tuple[Fraction, ...] | None:
    return (Fraction(number.value.numerator), Fraction(number.value.denominator)) if number else None


def _proportional(left: tuple[Fraction, ...] | None, right: tuple[Fraction, ...] | None) -> bool:
    if left is None or right is None or len(left) != len(right) or not any(left) or not any(right):
        return False
    return all(x * right[0] == y * left[0] for x, y in zip(left, right, strict=True)) and bool(left[0] and right[0])
