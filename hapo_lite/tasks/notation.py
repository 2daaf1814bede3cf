r"""Notation: one spelling for an answer that can be typed in different ways.

`tidy` unifies typography (Unicode, spacing, `\dfrac`, `\left(`) and keeps `\text{...}`. `canonical` unwraps
`\text{...}` too, and two texts are compared in this spelling. `plain_number` reads a number exactly. Nothing here
knows units, lists or algebra.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

ROW_END = r"\cr "
r"""The spelling of `\\` and a length behind it: `\\ ` would be mistaken for an escaped space, `\\[` for a formula."""

LONGEST_NUMBER = 2_000
"""Most characters of a number that is read exactly; Python refuses integers of more than 4,300 digits."""
DEEPEST = 30
"""Deepest nesting of brackets that is read: the readers call themselves for what stands in brackets, and the time of
the LaTeX parser grows fast with the depth."""

_ROW_END = re.compile(r"\\\\(?:\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\])?")
_DOUBLED_ESCAPE = re.compile(r"\\\\(?=[a-zA-Z])")
_LETTERS_BY_COMMAND = {
    **{
        "∞": "infty",
        "√": "sqrt",
        "π": "pi",
        "±": "pm",
        "∓": "mp",
        "≤": "le",
        "≥": "ge",
        "≠": "ne",
        "⩽": "le",
        "⩾": "ge",
    },
    **{
        "∪": "cup",
        "∩": "cap",
        "∈": "in",
        "∅": "emptyset",
        "→": "to",
        "·": "cdot",
        "⋅": "cdot",
        "×": "times",
        "÷": "div",
    },
    **{"α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "θ": "theta", "λ": "lambda", "μ": "mu", "ρ": "rho"},
    **{"σ": "sigma", "τ": "tau", "φ": "phi", "ω": "omega", "∠": "angle", "≡": "equiv", "≈": "approx", "∖": "setminus"},
}
_UNICODE = {c: f"\\{name} " for c, name in _LETTERS_BY_COMMAND.items()} | {
    **{
        "−": "-",
        "﹣": "-",
        "⁄": "/",
        "∕": "/",
        "∗": "*",
        "°": r"^{\circ}",
        "º": r"^{\circ}",
        "′": "'",
        "’": "'",
        "″": "''",
    },
    **{"。": ".", "、": ",", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "},
    **{"ℝ": r"\mathbb{R}", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "⟨": "(", "⟩": ")"},
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
_INVISIBLE_RUN = re.compile(rf"(?<![\d{_INVISIBLE}])[{_INVISIBLE}]+|[{_INVISIBLE}]+(?![\d{_INVISIBLE}])")
"""Characters without a width, except between two digits: what stands there is not one number."""
_DASH_FOR_MINUS = re.compile(r"(?<!\d)[–—‐‑‒]|[–—‐‑‒](?!\d)")
"""A dash that is a minus sign: 2–3 is a range."""
_ROOT_SIGN = re.compile(r"(\\sqrt(?:\[\d\])?) ?(\d+|\((?:[^()]*)\))")

_THOUSANDS = re.compile(r"(?<=\d)(?:(,)\s*\\!|\\[,!])\s*(?=\d{3}(?!\d))", re.ASCII)
_BRACED_COMMA = re.compile(r"\s*\{\s*,\s*\}\s*")
_ASCII_SIGNS = [
    (re.compile(typed), rf"\\{name} ") for typed, name in (("<=", "le"), (">=", "ge"), (r"(?<=\s)!=", "ne"))
]
_MARKED_UP = re.compile(r"""(\*\*|`{1,3}|")(?P<marked>.*)\1|“(?P<quoted>.*)”""", re.DOTALL)
_STYLES = re.compile(
    r"\\(?:bf|rm|it|sf|tt|bfseries|itshape|tiny|small|normalsize|large|Large|LARGE|huge|Huge)(?![a-zA-Z])"
    r"|\\tag\s*\{[^{}]*\}|\\color\s*\{[^{}]*\}"
)
_COLOURED = re.compile(r"\\(?:textcolor|colorbox)\s*\{[^{}]*\}\s*\{([^{}]*)\}")
_DOTS = re.compile(
    r"(?<![\d.])(\d{0,12}\.\d{0,3}?)(?:(\d)\2{2,}|(\d\d)\3+|(\d{3,5}?)\4{2,}|(\d{6,7}?)\5+)\s?"
    r"(?:\.{2,}|\\[lc]?dots(?![a-zA-Z])|…)",
    re.ASCII,
)
"""A decimal that goes on and repeats digits: 0.333..., 0.1212... More of them are asked of blocks such as in
2.718281828..., which does not repeat.
"""
_GROUPED = re.compile(r"-?\d{1,3}(?:( |\.|')\d{3})(?:\1\d{3})+", re.ASCII)
"""Two groups of thousands or more: one alone could be a decimal, a list or minutes of arc."""
_TIMES_TEN = re.compile(r"(?<=\d) ?[xX] ?(?=10 ?\^)")
_SPOKEN_INFINITY = re.compile(r"\\text\s*\{\s*infinity\s*\}|(?<![\\a-zA-Z])infinity(?![a-zA-Z])", re.IGNORECASE)
_SPACES = re.compile(r"(?:\\[,;:> ]|\\(?:quad|qquad|thinspace|enspace)(?![a-zA-Z])|~|\s)+")
_SIZES = re.compile(
    r"\\(?:left|right)(?:(?![a-zA-Z])\.?)|\\(?:[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits)(?![a-zA-Z])"
)
_TEXT_NAME = re.compile(
    r"\\(?:textbf|textit|textrm|textnormal|text|mbox|mathrm|mathbf|mathit|hbox|underline|boldsymbol)\s*\{"
)
_POWERS_IN_TEXT = 3
_POWER_IN_TEXT = re.compile(r"\\text\{([^{}]*)\^\s*\{\s*([+-]?\d+)\s*\}")
r"""Braces within text that hold the power of a unit, as in \mathrm{m s^{-1}}."""
_DOLLAR = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
_CURRENCY = re.compile(r"\s*-?\$\s*(?=[\d.])")
_SYNONYMS = [
    (re.compile(rf"\\(?:{names})(?![a-zA-Z])"), name)
    for names, name in [
        ("leq|leqslant|leqq", r"\\le"),
        ("geq|geqslant|geqq", r"\\ge"),
        ("neq", r"\\ne"),
        ("lt", "<"),
        ("gt", ">"),
        ("lbrace", r"\\{"),
        ("rbrace", r"\\}"),
        ("[dtc]frac", r"\\frac"),
        ("varnothing", r"\\emptyset"),
        ("degree", r"^{\\circ}"),
        ("bmod|mod", r"\\pmod"),
        ("land|wedge", r"\\text{ and }"),
        ("lor|vee", r"\\text{ or }"),
        ("i?imath", "i"),
        ("langle", "("),
        ("rangle", ")"),
    ]
]
_GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"
_ARGUMENT = rf"(?:{_GROUP}|\\[a-zA-Z]+|[^\s{{}}\\])"
_NESTED_FRACTIONS = 3
_FRACTION = re.compile(rf"\\frac\s*({_ARGUMENT})\s*({_ARGUMENT})")
_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(\\[a-zA-Z]+|[^\s{}\\\[])")
_ONE_CHARACTER = re.compile(r"([_^])\s*\{\s*(\w)\s*\}", re.ASCII)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))")
_SPACE_BY_SYMBOL = re.compile(r"(?<=[^\w.,]) | (?=[^\w.,])")
TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
"""Words within a formula, as `tidy` leaves them."""

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_PLAIN = re.compile(
    rf"""(?P<sign>[+-]?)(?:\\\$)?(?:
        (?P<number>{_DECIMAL})(?:
            [eE](?P<e>[+-]?\d{{1,3}})
            |(?:\\times[ ]?|\\cdot[ ]?|×|\*)10\^(?:\{{(?P<p>[+-]?\d{{1,3}})\}}|(?P<q>\d))
        )?
        |10\^(?:\{{(?P<r>[+-]?\d{{1,3}})\}}|(?P<s>\d))
        |(?P<w1>\d+)?\\frac\{{(?P<n1>[+-]?{_DECIMAL})\}}\{{(?P<d1>[+-]?{_DECIMAL})\}}
        |(?:(?P<w2>\d+)[ ])?(?P<n2>{_DECIMAL})/(?P<d2>[+-]?{_DECIMAL})
    )""",
    re.VERBOSE | re.ASCII,
)
_REPEATING = re.compile(
    r"-?(\d*)\.(\d*)(?:\\(?:overline|bar|dot) ?(?:\{(\d+)\}|(\d))|\((\d+)\)"
    r"|\\dot ?(?:\{(\d)\}|(\d)) ?(\d*)\\dot ?(?:\{(\d)\}|(\d)))",
    re.ASCII,
)
_LEFT_TO_DO = re.compile(
    r"[\d)}\]|!%]\s*(?:[-+]|(?:(?<!\*)\*(?!\*)|[×÷]|\\times|\\cdot|\\div)(?!\s*10\s*\^))\s*(?!\\text)(?=\S)"
    r"|[-+]\s*\(?\s*[-+]"
    r"|\\(?:sum|prod|int|lim|binom|gcd|lcm|max|min)(?![a-zA-Z])|[\d)}]\s*!"
    r"|\d ?\)? ?\( ?[-+]?(?:\d+(?:[./]\d+)?|\\frac\{[^{}]*\}\{[^{}]*\}) ?\)"
)
_NOTATION_OF_NUMBERS = re.compile(
    r"\\text\s*\{[^{}]*\}|\\(?:frac|times|cdot|circ|prime|overline|bar|dot)(?![a-zA-Z])"
    r"|(?<![a-zA-Z])(?:arc)?(?:sin|cos|tan|cot|sec|csc|pi)(?![a-zA-Z])|(?<![a-zA-Z])[ei](?![a-zA-Z])"
)
_FUNCTION = re.compile(r"[a-zA-Z|]")
_ROOT_OR_SIGNED_POWER = re.compile(
    r"\^\s*\{?\s*-?\s*(?:\d*\.\d|\d+\s*/|\\frac)|\(\s*-[^()]*\)\s*\^|i\s*\^\s*\{\s*-?\d{2,}"
)


@dataclass(frozen=True)
class Number:
    """A number read exactly.

    digits: the significant digits of a decimal, 0 for an integer or a fraction. last: the value of 1 in the last place
    of the decimal.
    """

    value: Fraction
    digits: int = 0
    last: Fraction = Fraction(0)


def tidy(text: str) -> str:
    """The same answer in one typography: digits of any script, Unicode symbols, spacing and sizes are unified."""
    marked_up = _MARKED_UP.fullmatch(text.strip())
    if marked_up is not None:
        text = marked_up["marked"] or marked_up["quoted"] or ""
    text = _DOTS.sub(lambda m: rf"{m[1]}\overline{{{m[2] or m[3] or m[4] or m[5]}}}", text)
    if not text.isascii():
        text = _folded(text)
    if "\\\\" in text:
        text = _DOUBLED_ESCAPE.sub(r"\\", text) if r"\begin" not in text else text
        text = _ROW_END.sub(lambda _: ROW_END, text)
    currency = _CURRENCY.match(text) if text.count("$") == 1 else None
    if currency is not None:
        text = currency.group().replace("$", r"\$") + text[currency.end() :]
    text = _THOUSANDS.sub(r"\1", _BRACED_COMMA.sub(",", text)).replace("\\!", "")
    if "=" in text:
        for sign, name in _ASCII_SIGNS:
            text = sign.sub(name, text)
    if "\\" in text:
        text = _with_one_name_each(text)
    if "x" in text or "X" in text:
        text = _TIMES_TEN.sub(r"\\times ", text)
    if "nfinity" in text:
        text = _SPOKEN_INFINITY.sub(r"\\infty ", text)
    text = _DOLLAR.sub("", _SPACES.sub(" ", text.replace("+/-", r"\pm "))).strip().rstrip(".,; ")
    text = text.removesuffix(ROW_END.strip()).rstrip()
    grouped = _GROUPED.fullmatch(text)
    if grouped is not None:
        return text.replace(grouped[1], "")
    wrapped = TEXT.fullmatch(text)
    return wrapped[1].strip() if wrapped and re.search(r"\d", wrapped[1]) else text


def _with_one_name_each(text: str) -> str:
    text = _TEXT_NAME.sub(r"\\text{", _SIZES.sub("", _COLOURED.sub(r"\1", _STYLES.sub("", text))))
    for _ in range(_POWERS_IN_TEXT):
        text = _POWER_IN_TEXT.sub(r"\\text{\1^\2", text)
    for pattern, name in _SYNONYMS:
        text = pattern.sub(name, text)
    text = _ROOT.sub(r"\\sqrt\1{\2}", text)
    # A match takes what is nested in it along, so each round finds the fractions one level further in.
    for _ in range(_NESTED_FRACTIONS):
        text = _FRACTION.sub(lambda m: rf"\FRAC{_braced(m[1])}{_braced(m[2])}", text)
    text = text.replace(r"\FRAC", r"\frac")
    return _DEGREES.sub(r"^{\\circ}", text).replace(r"\%", "%")


def _braced(argument: str) -> str:
    return argument if argument.startswith("{") else f"{{{argument}}}"


def _folded(text: str) -> str:
    text = _DASH_FOR_MINUS.sub("-", _INVISIBLE_RUN.sub("", text))
    text = _LOWERED_RUN.sub(lambda m: f"_{{{''.join(_LOWERED[c] for c in m[0])}}}", text)
    text = _RAISED_RUN.sub(lambda m: f"^{{{''.join(_RAISED[c] for c in m[0])}}}", text)
    return _ROOT_SIGN.sub(_root_of, "".join(_folded_character(c) for c in text))


def _folded_character(c: str) -> str:
    if c.isascii():
        return c
    if c in _UNICODE:
        return _UNICODE[c]
    digit = unicodedata.decimal(c, None)
    if digit is not None:
        return str(digit)
    if "\U0001d400" <= c <= "\U0001d7ff":  # letters in italics, bold and the like
        plain = unicodedata.normalize("NFKC", c)
        return _UNICODE.get(plain, plain)
    if "！" <= c <= "～":
        return chr(ord(c) - 0xFEE0)
    numerator, slash, denominator = unicodedata.normalize("NFKC", c).partition("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}" if slash and denominator else c


def _root_of(match: re.Match[str]) -> str:
    return f"{match[1]}{{{match[2].removeprefix('(').removesuffix(')')}}}"


def canonical(tidy_text: str) -> str:
    r"""One spelling for a tidy text: `\text{...}` unwrapped, braces around one character and needless spaces gone."""
    text = TEXT.sub(lambda m: m.group(1).strip(), tidy_text) if "{" in tidy_text else tidy_text
    return _SPACE_BY_SYMBOL.sub("", _ONE_CHARACTER.sub(r"\1\2", text))


def normal_form(answer: str) -> str:
    """One spelling for the ways to type an answer: answers of the same normal form vote together in maj@k."""
    return canonical(tidy(answer)).casefold()


def plain_number(text: str) -> Number | None:
    """The exact value of an integer, decimal, fraction, mixed number or a x 10^b in tidy notation; None for others."""
    if len(text) > LONGEST_NUMBER:
        return None
    match = _PLAIN.fullmatch(canonical(text).strip())
    if match is None:
        return _repeating(canonical(text))
    g = {name: value.replace(",", "") for name, value in match.groupdict().items() if value is not None}
    power = Fraction(10) ** next((int(g[name]) for name in "epqrs" if name in g), 0)
    written = g.get("number", "1")
    value = _fraction(written) * power
    for n in "12":
        if f"n{n}" in g:
            numerator, denominator, whole = _fraction(g[f"n{n}"]), _fraction(g[f"d{n}"]), g.get(f"w{n}")
            if not denominator or (whole is not None and not 0 <= numerator < denominator):
                return None
            value = int(whole or 0) + numerator / denominator
    value = -value if g["sign"] == "-" else value
    if "." not in written and "e" not in g:
        return Number(value)
    _, _, decimals = written.partition(".")
    return Number(value, len(written.replace(".", "").lstrip("0")) or 1, power / 10 ** len(decimals))


def _repeating(text: str) -> Number | None:
    r"""The value of a repeating decimal: 0.1\overline{6}, 0.1\dot6 and 0.1(6) are 1/6. None for other texts."""
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    fixed, repeated = match[2], "".join(filter(None, match.groups()[2:]))
    end = Fraction(int(repeated), 10 ** len(fixed) * (10 ** len(repeated) - 1))
    value = _fraction(f"{match[1]}.{fixed}") + end
    return Number(-value if text.startswith("-") else value)


def _fraction(digits: str) -> Fraction:
    whole, _, decimals = digits.partition(".")
    return Fraction(int(whole + decimals or "0"), 10 ** len(decimals))


def nested_too_deep(text: str) -> bool:
    """Whether the brackets of a text are nested deeper than DEEPEST."""
    if sum(map(text.count, "([{")) <= DEEPEST:
        return False
    depth = 0
    for character in text:
        if character in "([{":
            depth += 1
            if depth > DEEPEST:
                return True
        elif character in ")]}":
            depth = max(0, depth - 1)
    return False


def left_to_do(text: str) -> bool:
    """Whether a tidy text is arithmetic that is still to be done, such as 12+3*4."""
    return _LEFT_TO_DO.search(text) is not None


def function_left_to_do(text: str) -> bool:
    r"""Whether a single value in tidy notation has more in it than numbers and powers: \sqrt{144}, \log_2 8, |-5|.

    Trigonometric functions of known angles, and the numbers e, i and pi, are no more than numbers here.
    """
    without_numbers = _NOTATION_OF_NUMBERS.sub(" ", text)
    return _FUNCTION.search(without_numbers) is not None or _ROOT_OR_SIGNED_POWER.search(text) is not None
