"""The words beside numbers in school and contest mathematics: units, magnitudes and things that are counted."""

from __future__ import annotations

import re
from fractions import Fraction


def _table(dimension: str, units: dict[str, str | int]) -> dict[str, tuple[str, Fraction]]:
    return {name: (dimension, Fraction(factor)) for names, factor in units.items() for name in names.split()}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


UNITS = (
    _table(
        "length",
        {
            "m meter meters metre metres": 1,
            "km kilometer kilometers kilometre kilometres": 1000,
            "dm decimeter decimeters decimetre decimetres": "1/10",
            "cm centimeter centimeters centimetre centimetres": "1/100",
            "mm millimeter millimeters millimetre millimetres": "1/1000",
            "μm um micrometer micrometers micron microns": "1/1000000",
            "nm nanometer nanometers nanometre nanometres": "1/1000000000",
            "in inch inches": "0.0254",
            "ft foot feet": "0.3048",
            "yd yds yard yards": "0.9144",
            "mi mile miles": "1609.344",
        },
    )
    | _table(
        "time",
        {
            "s sec secs second seconds": 1,
            "ms millisecond milliseconds": "1/1000",
            "min mins minute minutes": 60,
            "h hr hrs hour hours": 3600,
            "day days": 86400,
            "wk wks week weeks": 604800,
        },
    )
    | _table("month", {"month months mo": 1, "yr yrs year years": 12, "decade decades": 120, "century centuries": 1200})
    | _table(
        "mass",
        {
            "g gm gram grams": 1,
            "kg kgs kilogram kilograms": 1000,
            "mg milligram milligrams": "1/1000",
            "tonne tonnes": 1000000,
            "oz ounce ounces": "28.349523125",
            "lb lbs pound pounds": "453.59237",
        },
    )
    | _table("dollar", {"dollar dollars usd bucks": 1, "cent cents ¢ penny pennies": "1/100"})
    | _table("angle", {"degree degrees deg": 1, "arcminute arcminutes": "1/60", "arcsecond arcseconds": "1/3600"})
    | _table("temperature", {"celsius": 1})
    | _table("energy", {"j joule joules": 1, "kj kilojoule kilojoules": 1000, "cal calorie calories": "4.184"})
    | _table("energy", {"kcal kilocalorie kilocalories": 4184, "kwh": 3600000})
    | _table("power", {"w watt watts": 1, "kw kilowatt kilowatts": 1000})
    | _table("frequency", {"hz hertz": 1, "khz": 1000, "mhz": 1000000, "ghz": 1000000000})
    | _table("pressure", {"pa pascal pascals": 1, "kpa": 1000, "atm": 101325, "bar": 100000})
    | _table("charge", {"c coulomb coulombs": 1})
    | _table("force", {"n newton newtons": 1, "kn": 1000})
    | _table("byte", {"byte bytes": 1, "kb kilobyte kilobytes": 1000, "mb megabyte megabytes": 1000000})
    | {
        name: (aliases.split()[0], Fraction(1))
        for aliases in (
            *("percent pct percents", "radian radians rad", "fahrenheit", "kelvin kelvins k", "mole moles mol mols"),
            *("volt volts v", "ampere amperes amp amps", "ohm ohms", "unit units", "acre acres", "ton tons"),
            *("euro euros", "yuan rmb", "rupee rupees rs", "yen", "peso pesos", "pence", "ev", "hectare hectares"),
            *("gallon gallons gal", "quart quarts qt", "pint pints pt", "cup cups", "knot knots", "bit bits"),
            *("tablespoon tablespoons tbsp", "teaspoon teaspoons tsp", "light-year light-years"),
        )
        for name in aliases.split()
    }
)
"""(base quantity, factor) by name in lower case. Names may be written in any case, except for CASED."""
CASED = {
    **{
        prefix + symbol: (dimension, Fraction(factor))
        for prefix, factor in (("m", "1/1000"), ("M", 10**6))
        for symbol, dimension in (
            *(("Hz", "frequency"), ("W", "power"), ("J", "energy"), ("N", "force"), ("Pa", "pressure")),
            *(("A", "ampere"), ("V", "volt"), ("eV", "ev")),
        )
    },
    **{"Mm": ("length", Fraction(10**6)), "Mg": ("mass", Fraction(10**6)), "Ms": ("time", Fraction(10**6))},
    **{"Nm": ("newton metre", Fraction(1)), "Mb": ("bit", Fraction(10**6))},
    **{symbol: (f"unit {symbol}", Fraction(1)) for symbol in "MHSG"},
}
"""Symbols that mean another unit in lower case: the henry H is no hour, 2 M is molar and no metre."""
VOLUMES = _table("length", {"l L liter liters litre litres": "1/1000", "ml mL milliliter milliliters cc": "1/1000000"})
SPEEDS = {"mph": ("mi", "h"), "kph": ("km", "h"), "kmph": ("km", "h"), "kmh": ("km", "h"), "fps": ("ft", "s")}

MAGNITUDES = {
    name + plural: value
    for name, value in (
        *(("dozen", 12), ("hundred", 100), ("thousand", 1000), ("million", 10**6), ("billion", 10**9)),
        *(("trillion", 10**12), ("quadrillion", 10**15), ("lakh", 10**5), ("crore", 10**7)),
    )
    for plural in ("", "s")
}
ALIASES = {"a.m": "am", "p.m": "pm", "fewer": "less", "greater": "more", "'": "arcminute", "''": "arcsecond"}
SAID_WITHOUT_MEANING = _words("exactly of total possible different distinct")
DESCRIBING = _words("old long tall high wide deep red blue green white black yellow brown orange purple pink gray grey")
"""Words that an answer may leave out or add, but not exchange: 5 red marbles are 5, and no 5 blue marbles."""
PHRASES = [
    (
        re.compile(
            r"\b(?:in|a) (?:total|all|length|height|width|area|volume|order)\b( of\b)?|\bof age\b|\baltogether\b"
        ),
        " ",
    ),
    (re.compile(r"\bfl\.? ?oz\b|\bfluid ounces?\b"), " fluidounce "),
    (re.compile(r"\b(?:degrees? )(?:celsius|c)\b", re.IGNORECASE), " celsius "),
    (re.compile(r"\b(?:degrees? )(?:fahrenheit|f)\b", re.IGNORECASE), " fahrenheit "),
    (re.compile(r"\bper ?cent\b|\bpercentage\b"), " percent "),
    (re.compile(r"\b([ap])\. ?m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"\band\b(?= ?\d)"), " "),
]
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, "squared": 2, "cubed": 3}
PEOPLE = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse", "geese": "goose"}
COUNTED = _words(
    "person man woman child mouse goose fish sheep deer apple egg student way integer solution cat dog point digit "
    "side edge vertex vertices triangle marble coin book page ticket player team game car"
)
"""Things that are counted; any other regular plural is taken as one too."""
NO_COUNT = _words(
    "times dozens pairs couples scores losses gains wins less minus plus halves thirds quarters fourths fifths sixths "
    "sevenths eighths ninths debts deficits is was has as this us its thus pass across "
    "downwards upwards forwards backwards afterwards bits tens ones others increases decreases remainders "
    "loses falls rises drops doubles triples negatives inverses reciprocals factorials logarithms quintillions"
)
"""Words that end like a plural and may change the value."""
PARTS = re.compile(
    r"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen|\w+tie|\w*hundred|\w*thousand|\w+illion)ths"
)
"""Plurals of ordinals, which divide: twelfths, sixteenths, twentieths, millionths."""
FUNCTIONS = _words("sin cos tan cot sec csc log ln exp sqrt lim max min gcd lcm mod det arcsin arccos arctan")
KNOWN = frozenset(
    {*(name for name in UNITS if len(name) > 1), *(name for name in VOLUMES if len(name) > 1), *SPEEDS, *MAGNITUDES}
    | {*PEOPLE, *COUNTED, *(f"{name}s" for name in COUNTED), "am", "pm", "per", "square", "cubic", "sq", "cu", "and"}
) - {"ms", "mo", "pt", "ev", "kn", "pa", "mb", "kb", "kw", "rs", "um", "bar", "and"}
"""Words that are words even without `\\text` and a space before them; others could be a product of letters."""
