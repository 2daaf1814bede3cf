r"""A number and its words, read together: `3\text{ hours }20\text{ minutes}`, `8\text{ million}`, `2:30\text{ pm}`.

`read_quantity` divides an answer into values, the unit of each, and the words that are neither. `scales` says how the
values of two quantities compare: one side alone may have a unit, but not other words. Powers are read, and units of one
dimension convert exactly (100 cm is 1 m).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from hapo_lite.tasks.notation import TEXT, plain_number
from hapo_lite.tasks.vocabulary import (
    ALIASES,
    CASED,
    COUNTED,
    DESCRIBING,
    FUNCTIONS,
    KNOWN,
    MAGNITUDES,
    NO_COUNT,
    PARTS,
    PEOPLE,
    PHRASES,
    POWERS,
    SAID_WITHOUT_MEANING,
    SPEEDS,
    UNITS,
    VOLUMES,
)


@dataclass(frozen=True)
class Unit:
    """A unit. dimensions: (base quantity, power) pairs, sorted; factor: its size in base units."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


class Measure(NamedTuple):
    """A value in LaTeX, the magnitude that multiplies it, such as a million or a dozen, and its unit."""

    value: str
    magnitude: Fraction = Fraction(1)
    unit: Unit | None = None


@dataclass(frozen=True)
class Quantity:
    """An answer with its words. parts: its measures, several in a compound measure.

    others: the words, in lower case, that are neither unit nor magnitude, such as `or more`.
    """

    parts: tuple[Measure, ...]
    others: tuple[str, ...] = ()


_WORD = r"[A-Za-z¢µμ][A-Za-zμ]*(?:[.'-][A-Za-z]+)*\.?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>-?\d[\d,]*(?:\.\d+)?(?:/\d+)?)|(?P<power>\^-?\d+)|(?P<word>{_WORD}|'+)|(?P<sign>[/·*]))"
)
_TAIL = re.compile(
    r"\\text\{|%|\^\{\\circ\}|\^\{?(?:\\prime\s*)+\}?|(?<=\d)'+|(?<=\d)\s*[ap]\.\s?m\b"
    r"|(?<![\\A-Za-z])[A-Za-z]{2,}|(?<=[\d\s}])[gmNJ]\s*/\s*(?:s|h|hr|sec|min|cm|ml|mL|kg|mol)(?![A-Za-z])"
)
_ORDINAL = re.compile(r"(?<=\d)(?:\^?\{?\\text\s*\{\s*(?:st|nd|rd|th)\s*\}\}?|(?:st|nd|rd|th)\b)")
_ANGLE_WITHIN = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_PRIMES = re.compile(r"\^\{?((?:\\prime\s*)+)\}?")
_CURRENCY = re.compile(r"([+-]?)\s*(?:US)?(\\\$|€|£|¥|₹)\s*(?=[\d.\\])")
_CURRENCIES = {r"\$": "dollar", "€": "euro", "£": "pound-sterling", "¥": "yen", "₹": "rupee"}
_TWO_MEASURES = re.compile(r"\D*\d[^A-Za-z}']*[A-Za-z}']\D*\d[^A-Za-z}']*[A-Za-z}']")
"""A number, a word, a number and a word. No part can give back what it took, so the time is linear in the text."""
_CHANGING = re.compile(
    r"\b(?:or|at) (?:more|less|fewer|most|least|higher|lower|above|below)\b|\b[ap]\.?m\b|\b(?:more|less|fewer) than\b"
    r"|\b(?:(?:hundred|thousand|million|billion|trillion|quadrillion|lakh|crore|dozen|pair)s?|half|below zero)\b"
    r"|\b(?:loss|gain|increase|decrease)\b"
    r"|^\W*(?:squared|cubed|factorial|plus|minus|times|over|to the|mod|divided|multiplied|percent of)\b"
    r"|\b(?:if|unless|except|when|otherwise|or|is (?:not|wrong))\b",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(
    r"[,;:!?(\n]|\.(?!\w)|\b(?:because|since|as|so|which|where|(?<!is )not|rather than|instead of)\b", re.IGNORECASE
)
_CHANGED = re.compile(
    r"\b(?:not|cannot|never|neither|nor|negative|minus|plus|than|almost|nearly|approximately|about|around|roughly)\b"
    r"|n[’']t\b|\b(?:close to|under|over|below|above|at least|at most|up to|between|twice|thrice|double|triple)\b"
    r"|\b(?:half|third|quarter|percent|sum|product|difference|root|square|cube|logarithm|factorial|inverse|reciprocal"
    r"|instead|multiple|power) of\b|\b(?:divided|multiplied|raised|times|modulo|mod|log|wrong|without|except|besides)\b"
    r"|[<>≤≥≠≈±]|\\(?:g?eq?|geq|leq?|neq?|approx|[lg]t|pm|sqrt)(?![a-zA-Z])",
    re.IGNORECASE,
)
_CLAUSE_START = re.compile(
    r"[;:.!?\n=]|,\s|\b(?:is|are|was|were|so|hence|thus|therefore|then|get|gets|gives|have|has|but|becomes)\b|\d",
    re.IGNORECASE,
)
_LISTED = re.compile(r"\d[^\s\d]*\s+(?:[A-Za-z]+\s+)?(?:and|or)\W*$|\d\s*[,;]\W*$", re.IGNORECASE)
_FLAT = [
    (re.compile(r"\\text\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\s*\{\s*([+-]?\d+)\s*\}"), r"^\1"),
    (re.compile(r"\^\s*\+?"), "^"),
    (re.compile(r"%"), " percent "),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "·"),
    (re.compile(r"\\\$"), " dollar "),
    (re.compile(r"[()]"), " "),
]


def read_quantity(text: str) -> Quantity:
    """The values, units and other words of an answer in tidy notation; one value where there are no words."""
    whole = Quantity((Measure(text),))
    currency = _CURRENCY.match(text)
    prefix = _CURRENCIES[currency[2]] if currency else None
    bare = currency[1] + text[currency.end() :] if currency else text
    bare = _ORDINAL.sub("", bare)
    start = None if _ANGLE_WITHIN.search(bare) else _first_word(bare)
    if start is None:
        return Quantity((Measure(bare, unit=_base_unit(prefix) if prefix else None),))
    head, tail = bare[:start].strip(), _flat(bare[start:])
    if not head or head[-1] in "+-*/=({[,<>^_\\|" or _is_words(head) or not _balanced(head):
        return whole
    groups = _groups(head, tail)
    return _assembled(groups, prefix) if groups else whole


def _base_unit(dimension: str) -> Unit:
    return Unit(((dimension, 1),), Fraction(1))


def _is_words(text: str) -> bool:
    return len(text) > 1 and text.replace(" ", "").isalpha()


def _balanced(text: str) -> bool:
    return all(text.count(opening) == text.count(closing) for opening, closing in ("()", "[]", "{}"))


def _first_word(text: str) -> int | None:
    """The position of the first word behind a value: text in braces, a unit's sign, or a word that is not a product."""
    for match in _TAIL.finditer(text):
        word = match.group().strip()
        if not word.isalpha():
            return match.start()
        before = text[match.start() - 1] if match.start() else ""
        if before == "}" and len(word) == 2 and word not in ("cm", "mm", "km", "kg"):
            continue  # \frac{1}{3}ml^2 is a product of letters
        spaced = before == " "
        prose = spaced and (len(word) > 2 or word == "or") and word.islower() and word not in FUNCTIONS
        if word.lower() in KNOWN or prose:
            return match.start()
    return None


def _flat(tail: str) -> str:
    """The words behind a value as plain text, without commands of LaTeX."""
    text = _PRIMES.sub(lambda m: "'" * m[1].count("prime"), tail).replace(r"^{\circ}", " degree ")
    for pattern, plain in _FLAT:
        text = pattern.sub(plain, text)
    text = " ".join(text.split())
    for pattern, plain in PHRASES:
        text = pattern.sub(plain, text)
    return text


def _groups(head: str, tail: str) -> list[tuple[str, list[str]]]:
    """Each value with its words, signs and powers; none where something else stands among them."""
    groups: list[tuple[str, list[str]]] = [(head, [])]
    position = 0
    while position < len(tail) and tail[position:].strip(" .,"):
        token = _TOKEN.match(tail, position)
        if token is None:
            if tail[position] not in " .,":  # "3 hours, 20 minutes"
                return []
            position += 1
            continue
        if token["number"]:
            groups.append((token["number"], []))
        else:
            groups[-1][1].append((token["power"] or token["word"] or token["sign"]).rstrip("."))
        position = token.end()
    return groups


def _assembled(groups: list[tuple[str, list[str]]], prefix: str | None) -> Quantity:
    """The quantity of some groups. prefix: the currency that stands before all of them."""
    parts = []
    others = []
    for value, words in groups:
        measure, left = _read_words(value, words)
        unit = measure.unit
        if prefix and (unit is None or unit.dimensions != ((prefix, 1),)):
            measure = measure._replace(unit=_times(_base_unit(prefix), unit))
        parts.append(measure)
        others += left
    return Quantity(tuple(parts), tuple(others))


def _read_words(value: str, words: list[str]) -> tuple[Measure, list[str]]:
    """A value with the magnitude and unit that the words behind it name, and the words that name neither."""
    magnitude = Fraction(1)
    unit: Unit | None = None
    others: list[str] = []
    last: Unit | None = None  # the unit that a power behind it raises
    sign = 1
    power = 1
    for word in words:
        low = ALIASES.get(word.lower(), word.lower())
        if word in ("/", "per") or low == "per":
            sign = -1
            last = None
        elif word in "·*" or low in SAID_WITHOUT_MEANING:
            continue
        elif word[0] == "^" or low in ("squared", "cubed"):
            if last is None or (word[0] == "^" and len(word) > len("^-9")):
                others.append(low)
            else:
                raised_to = int(word[1:]) if word[0] == "^" else POWERS[low]
                unit = _times(unit, last, raised_to - 1)
        elif low in ("square", "sq", "cubic", "cu"):
            power = POWERS[low]
        elif low in MAGNITUDES:
            magnitude *= MAGNITUDES[low]
        else:
            named = unit_of(word)
            if named is None:
                others.append(low)
                continue
            last = _raised(named, sign)
            unit = _times(unit, last, power)
            power = 1
    return Measure(value, magnitude, unit), others


def unit_of(word: str) -> Unit | None:
    """The unit, or the kind of thing counted, that one word names; None for words that name neither."""
    low = ALIASES.get(word.lower(), word.lower())
    if word in CASED:
        dimension, factor = CASED[word]
        return Unit(((dimension, 1),), factor)
    if low in SPEEDS:
        above, below = (UNITS[name] for name in SPEEDS[low])
        return Unit(((above[0], 1), (below[0], -1)), above[1] / below[1])
    if low in UNITS:
        dimension, factor = UNITS[low]
        return Unit(((dimension, 1),), factor)
    if word in VOLUMES or low in VOLUMES:
        return Unit((("length", 3),), VOLUMES[low][1])
    if low == "fluidounce":
        return Unit((("fluid ounce", 1),), Fraction(1))
    thing = PEOPLE.get(low, low.removesuffix("s") if not low.endswith("ss") else low)
    changing = low in NO_COUNT or PARTS.fullmatch(low) is not None
    plural = low in PEOPLE or (low.endswith("s") and len(low) > 3 and not low.endswith("ss"))
    if low.isalpha() and not changing and (plural or thing in COUNTED):
        return Unit(((f"one {thing}", 1),), Fraction(1))
    return None


def _times(a: Unit | None, b: Unit | None, power: int = 1) -> Unit | None:
    """a x b^power; None stands for no unit."""
    if b is None:
        return a
    dimensions = dict(a.dimensions) if a else {}
    for dimension, exponent in b.dimensions:
        dimensions[dimension] = dimensions.get(dimension, 0) + exponent * power
    kept = tuple(sorted((d, p) for d, p in dimensions.items() if p))
    return Unit(kept, (a.factor if a else Fraction(1)) * b.factor**power)


def _raised(unit: Unit, sign: int) -> Unit:
    """The unit, or for sign -1 its inverse."""
    return unit if sign == 1 else Unit(tuple((d, -p) for d, p in unit.dimensions), 1 / unit.factor)


def scales(gold: Quantity, answer: Quantity) -> list[tuple[Fraction, Fraction]]:
    """The ways in which the values of two quantities of one part compare: factors of the gold and of the answer.

    There is none where words or units differ, and there are two where one side alone has a percent sign: 10% is 10 or
    0.1.
    """
    if not _same_words(gold, answer) or len(gold.parts) != 1 or len(answer.parts) != 1:
        return []
    (_, gold_magnitude, gold_unit), (_, answer_magnitude, answer_unit) = gold.parts[0], answer.parts[0]
    scaled = [(gold_magnitude, answer_magnitude)]
    if gold_unit is not None and answer_unit is not None:
        if gold_unit.dimensions != answer_unit.dimensions:
            return []
        return [(gold_magnitude * gold_unit.factor, answer_magnitude * answer_unit.factor)]
    percent = (("percent", 1),)
    if gold_unit is not None and gold_unit.dimensions == percent:
        scaled.append((gold_magnitude / 100, answer_magnitude))
    if answer_unit is not None and answer_unit.dimensions == percent:
        scaled.append((gold_magnitude, answer_magnitude / 100))
    return scaled


def _same_words(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities have the same words. One of them may leave out all words that only describe a thing."""
    g, a = (Counter(quantity.others) for quantity in (gold, answer))
    described = [{word: n for word, n in words.items() if word in DESCRIBING} for words in (g, a)]
    return g == a or (not all(described) and g - Counter(described[0]) == a - Counter(described[1]))


def same_compound(gold: Quantity, answer: Quantity) -> bool:
    """Whether two quantities, one of them of several parts, are equal: 1 hour 20 minutes is 80 minutes."""
    if not _same_words(gold, answer):
        return False
    gold_total, answer_total = _total(gold), _total(answer)
    if gold_total is not None and answer_total is not None:
        return gold_total == answer_total
    if len(gold.parts) != len(answer.parts):
        return False
    return all(_same_measure(g, a) for g, a in zip(gold.parts, answer.parts, strict=True))


def _same_measure(gold: Measure, answer: Measure) -> bool:
    gold_number, answer_number = plain_number(gold.value), plain_number(answer.value)
    if gold_number is None or answer_number is None:
        return False
    ways = scales(Quantity((gold,)), Quantity((answer,)))
    return any(gold_number.value * g == answer_number.value * a for g, a in ways)


def _total(quantity: Quantity) -> Unit | None:
    """The sum of all parts as one unit; None unless all have numbers and units of one dimension."""
    total = Fraction(0)
    dimensions = set()
    for value, magnitude, unit in quantity.parts:
        number = plain_number(value)
        if number is None or unit is None:
            return None
        total += number.value * magnitude * unit.factor
        dimensions.add(unit.dimensions)
    return Unit(dimensions.pop(), total) if len(dimensions) == 1 else None


def is_compound(text: str) -> bool:
    """Whether a tidy text is one measure in several units that get smaller, such as 3 hours and 20 minutes."""
    if not _TWO_MEASURES.match(text):
        return False
    quantity = read_quantity(text)
    units = [part.unit for part in quantity.parts if part.unit is not None]
    if len(units) < 2 or not DESCRIBING.issuperset(quantity.others) or _total(quantity) is None:
        return False
    return all(a.factor > b.factor for a, b in pairwise(units))


def words_change_value(text: str) -> bool:
    """Whether the clause behind a number in running text changes the number: `or more`, `million`, `pm`, `squared`."""
    return _CHANGING.search(_CLAUSE_END.split(TEXT.sub(r" \1 ", text), maxsplit=1)[0]) is not None


def words_before_change_value(text: str) -> bool:
    """Whether the clause in front of a number in running text changes it, or the number is the last of several."""
    return _LISTED.search(text) is not None or _CHANGED.search(_CLAUSE_START.split(text)[-1]) is not None
