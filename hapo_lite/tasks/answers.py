r"""The answer that counts in a completion, and the grade where it is plain to see.

`find` looks outside `<think>`: an `<answer>` tag, else the boxes at the end, else what follows the last "answer is",
"Answer:" or `####`, else the last formula. `read` grades a plain case or makes the request for a grading process.
docs/rewards.md has the rules as a table, with their reasons.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from typing import Literal

from hapo_lite.tasks import plain
from hapo_lite.tasks.notation import canonical, normal_form, plain_number, tidy
from hapo_lite.tasks.units import read_quantity, unit_of, words_before_change_value, words_change_value
from hapo_lite.tasks.vocabulary import KNOWN

Outcome = Literal["correct", "wrong", "unparseable", "timeout", "error"]

LONGEST_ANSWER = 2_000
"""Most characters read of an answer, and of the end of a text that states none."""
_SEARCHED = 100_000
_LONGEST_GAP = 60


@dataclass(frozen=True)
class Grade:
    """One verdict. answer: the text that was graded, None where none was found.

    outcome: "correct"; "wrong"; "unparseable": the completion states no answer; "timeout": comparing took longer than
    the deadline; "error": the grading process died, for instance out of memory, or the text cannot be read.
    """

    correct: bool
    answer: str | None
    outcome: Outcome


@dataclass(frozen=True)
class Found:
    """The answer found in a completion. answer: the text that counts, None where there is none.

    line: the whole sentence of an answer in running text. open: whether a tag or box was begun and not ended, so that
    the completion has no answer.
    """

    answer: str | None = None
    line: str | None = None
    open: bool = False


@dataclass(frozen=True)
class _Mark:
    """The content of a box or tag, and where the box or tag begins and ends."""

    content: str
    start: int
    end: int


@dataclass(frozen=True)
class _Span:
    """A box within a text: where its content begins and ends, and where the box itself does."""

    content: tuple[int, int]
    start: int
    end: int


_BOX_TOKENS = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BOX_START = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{")
_SIMPLE_BOX = re.compile(r"\\{1,2}(?:boxed|fbox)\s*\{([^{}]*)\}")
_SHOWN = re.compile(r"\S")
_MOST_BOXES = 20
"""Most boxes at the end of a text that are taken for one answer."""
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_THINK = re.compile(r"<(/?)think>")
_CONNECTING = re.compile(
    r"\n\s*\(?(?:\d{1,2}|[A-Za-z])[.)]|\b(?:if|when)\b[^.\n]*(?:,|\band\b|\bor\b)|[A-Za-z](?:_\{?\w{1,4}\}?)?\s*=(?!=)"
    r"|[\s,;.:&/$*()|•–—-]|\\[()\[\],;!:\\]|\\q?quad(?![a-zA-Z])|\\(?:text|boxed|fbox)\s*\{|\}"
    r"|\b(?:and|or|also|maybe|perhaps|possibly|either|both|alternatively|else|otherwise|then|vs|versus)\b",
    re.IGNORECASE,
)
_JOINS = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)
_HEDGE = re.compile(r"\b(?:or|also|maybe|perhaps|possibly|alternatively)\b", re.IGNORECASE)
_HEDGED = re.compile(r"\b(?:the|final|answer|is|it|could|might|may|be|as|well|value)\b", re.IGNORECASE)
_STATEMENT = re.compile(r"\banswer\b[*_\s]{0,8}(?:is\b|[:=])[*_:\s]{0,8}|####", re.IGNORECASE)
_FORMULA = r"\$(?:\\.|[^$\\])+\$"
_FORMULAS = re.compile(rf"{_FORMULA}(?:\s*(?:,?\s*and\b|,?\s*or\b|,|;)\s*{_FORMULA})*", re.DOTALL)
_DISPLAYED = (("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"))
_SENTENCE_END = re.compile(r"\.(?=\s|$)")
_DIGIT = re.compile(r"\d")
_PROSE = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_REASON = re.compile(r"(?<![\s,;])[\s,;]+(?:because|since|not|rather than|instead of)\b", re.IGNORECASE)
_VALUE = re.compile(rf"{_FORMULA}|\d+ \d+/\d+|[^\s$]*\d[^\s]*")
_NEXT_WORD = re.compile(r"\s+([A-Za-z]+)\b")
_SPOKEN_SIGN = re.compile(r"^(?:negative|minus)\s+(?=[\d.\\$])", re.IGNORECASE)
_OPERATOR = r"\s*(?:[-+*/^×÷]|\\times|\\cdot|\\div)\s*"
_OPERAND_BEHIND = re.compile(rf"{_OPERATOR}(?:[\d({{\\]|[a-zA-Z](?![a-zA-Z]))")
_OPERAND_BEFORE = re.compile(rf"(?:[\d)}}]|(?<![a-zA-Z])[a-zA-Z]){_OPERATOR}$")
CHARACTERS_BEFORE = 80
"""Characters in front of a number in running text that may change it."""


# ------------------------------------------------------------------------------------------------ finding the answer


def boxed_answer(text: str) -> str | None:
    r"""Content of the last complete, non-empty `\boxed{...}` or `\fbox{...}`; None where there is none.

    A box around nothing but a box is that box; a box that has more in it is the answer, with the boxes within.
    """
    boxes, _ = _boxes(text[-_SEARCHED:])
    return boxes[-1].content if boxes else None


def marked_answer(text: str) -> str | None:
    """The answer in the `<answer>` tag or the boxes at the end of a text, outside `<think>`; None without either."""
    return _marked(_outside_think(text)).answer


def find(text: str) -> Found:
    """The answer that counts in a completion."""
    text = _outside_think(text)
    marked = _marked(text)
    if marked.answer is not None or marked.open:
        return marked
    stated = _stated(text)
    return stated if stated.answer is not None else _last_formula(text)


def _outside_think(text: str) -> str:
    """The text without what stands in `<think>`. An end without a beginning ends a block that the prompt began."""
    if "think>" not in text:
        return text
    start = max(0, len(text) - _SEARCHED)
    within = text.rfind("<think>", 0, start) > text.rfind("</think>", 0, start)
    kept: list[str] = []
    last = start
    for tag in _THINK.finditer(text, start):
        if tag[1] and not within:
            kept.clear()
        elif not tag[1] and not within:
            kept.append(text[last : tag.start()])
        within, last = not tag[1], tag.end()
    return "".join(kept) + ("" if within else text[last:])


def _marked(text: str) -> Found:
    """The answer in tags, else in boxes."""
    text = _ANSWER_TAG.sub(r"<\1answer>", text[-_SEARCHED:])
    tags = _tags(text)
    if tags:
        inner = [_marked(tag.content).answer or _stated(tag.content).answer or tag.content for tag in tags]
        return Found(_joined(inner))
    boxes, open_box = _boxes(text)
    if boxes:
        return Found(_joined([_without_boxes(box.content) for box in _run_at_the_end(text, boxes)]))
    return Found(open=open_box or "<answer>" in text[text.rfind("</answer>") + 1 :])


def _tags(text: str) -> list[_Mark]:
    """The last complete, non-empty `<answer>` tags with nothing between them but commas and the like."""
    tags: list[_Mark] = []
    end = text.rfind("</answer>")
    while end >= 0 and len(tags) < 10:
        start = text.rfind("<answer>", 0, end)
        if start < 0 or (tags and not _connects(text[end + len("</answer>") : tags[0].start])):
            break
        content = text[start + len("<answer>") : end].strip()
        if content:
            tags.insert(0, _Mark(content, start, end + len("</answer>")))
        end = text.rfind("</answer>", 0, start)
    return tags


def _boxes(text: str) -> tuple[list[_Mark], bool]:
    """(the last outermost complete, non-empty boxes, whether one is left open at the end), found in one pass."""
    open_braces: list[tuple[int, int] | None] = []
    boxes: list[_Span] = []
    for token in _BOX_TOKENS.finditer(text):
        piece = token.group()
        if piece == "{":
            open_braces.append(None)
        elif piece == "}":
            box = open_braces.pop() if open_braces else None
            if box is None:
                continue
            start, content_start = box
            content = content_start, token.start()
            within = [boxes.pop() for _ in range(_count_behind(boxes, start))]
            around = [(content_start, within[0].start), (within[0].end, token.start())] if len(within) == 1 else []
            if around and not any(_SHOWN.search(text, *gap) for gap in around):
                content = within[0].content
            if _SHOWN.search(text, *content):
                boxes.append(_Span(content, start, token.end()))
        elif piece[-1] == "{" and len(piece) > 2:
            open_braces.append((token.start(), token.end()))
    marks = [_Mark(text[slice(*b.content)].strip(), b.start, b.end) for b in boxes[-_MOST_BOXES:]]
    return marks, any(start is not None for start in open_braces)


def _without_boxes(content: str) -> str:
    """The content of a box without the boxes around its parts: 3 \\boxed{5} is 3 and 5 side by side, and not 35."""
    return _BOX_START.sub("{", _SIMPLE_BOX.sub(r" \1 ", content)).strip()


def _count_behind(boxes: list[_Span], start: int) -> int:
    """How many of the last boxes begin behind a position."""
    count = 0
    while count < len(boxes) and boxes[-1 - count].start > start:
        count += 1
    return count


def _run_at_the_end(text: str, boxes: list[_Mark]) -> list[_Mark]:
    r"""The last box, and those before it with nothing between but commas, "and", "or", `x =`: one answer."""
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if not _connects(text[box.end : run[0].start]):
            break
        run.insert(0, box)
    return run


def _connects(gap: str) -> bool:
    """Whether a text only joins values, such as " and ", " apples, " or " or it could be "."""
    if len(gap) > _LONGEST_GAP:
        return False
    left = _CONNECTING.sub(" ", _HEDGED.sub(" ", gap) if _HEDGE.search(gap) else gap).split()
    return not left or (_JOINS.search(gap) is not None and all(unit_of(word) is not None for word in left))


def _joined(contents: list[str]) -> str:
    """Several values as one answer; the same value twice counts once."""
    kept: dict[object, str] = {}
    for content in contents:
        number = plain_number(tidy(content)) if len(content) < LONGEST_ANSWER else None
        kept.setdefault(number.value if number else normal_form(content[:LONGEST_ANSWER]), content)
    return "; ".join(kept.values())


def _stated(text: str) -> Found:
    """The formula, else the sentence, that follows the last "answer is", "Answer:" or `####`."""
    statements = deque(_STATEMENT.finditer(text, max(0, len(text) - _SEARCHED)), maxlen=1)
    if not statements:
        return Found()
    start = statements.pop().end()
    return _formula_or_line(text[start : start + LONGEST_ANSWER])


def _last_formula(text: str) -> Found:
    r"""The last $...$, \(...\) or \[...\] near the end of a text, if no number follows it."""
    tail = text[-LONGEST_ANSWER:]
    last = deque(_FORMULAS.finditer(tail), maxlen=1)
    places = [(last[0].start(), last[0].end())] if last else []
    for opening, closing in _DISPLAYED[:2]:
        start = tail.rfind(opening)
        end = tail.find(closing, start) if start >= 0 else -1
        if end >= 0:
            places.append((start, end + len(closing)))
    if not places or _DIGIT.search(tail, max(places)[1]):
        return Found()
    start = max(places)[0]
    if words_before_change_value(tail[max(0, start - CHARACTERS_BEFORE) : start]):
        return Found()
    return _formula_at(tail[start:])


def _formula_or_line(text: str) -> Found:
    """The formula that a text begins with, else its first sentence."""
    text = text.strip().lstrip("*_ ")
    found = _formula_at(text)
    line = _first_sentence(text)
    return found if found.answer is not None else Found(line, line)


def _formula_at(rest: str) -> Found:
    """The formula that a text begins with, with the first sentence; no answer where there is none."""
    line = _first_sentence(rest)
    for opening, closing in _DISPLAYED:
        end = rest.find(closing, 2) if rest.startswith(opening) else -1
        if end > 0:
            return Found(rest[2:end].strip() or None, line)
    formula = None
    match = _FORMULAS.match(rest)
    if match is not None:
        formula = match.group()
        # "$2$ or more": the words belong to the number.
        if line and words_change_value(line[len(formula) : len(formula) + _LONGEST_GAP]):
            formula = line
    return Found(formula, line)


def _first_sentence(text: str) -> str | None:
    """The first line of a text, up to its first full stop; None where that is empty."""
    line = text.split("\n", 1)[0]
    stop = _SENTENCE_END.search(line)
    if stop is not None:
        line = line[: stop.start()]
    return line.strip().rstrip("*_ ") or None


# ------------------------------------------------------------------------------------------------- the plain cases


def read(text: str, gold: str) -> Grade | dict[str, str]:
    """The grade in a plain case, else the request for a grading process: see `_grader.judge`."""
    found = find(text)
    gold = tidy(marked_answer(gold) or gold)
    if found.open:
        return Grade(False, None, "unparseable")
    # A gold answer may be a formula with words after it: "$f(x)=ax$, where $a$ is an integer".
    if found.line and gold and canonical(tidy(found.line)) == canonical(gold):
        return Grade(True, found.line, "correct")
    if found.answer is None:
        if not gold or len(gold) > LONGEST_ANSWER:
            return Grade(False, None, "unparseable")
        return {"text": _outside_think(text)[-LONGEST_ANSWER:], "gold": gold}
    return _compared(found.answer, found.line, gold)


def _compared(shown: str, line: str | None, gold: str) -> Grade | dict[str, str]:
    """The grade of an answer as the completion shows it, or the request. line: its sentence, in running text."""
    if len(shown) > LONGEST_ANSWER:
        return Grade(False, None, "unparseable")
    answer = tidy(shown if line is None else _SPOKEN_SIGN.sub("-", shown))
    if len(answer) > LONGEST_ANSWER:  # some characters stand for many
        return Grade(False, None, "unparseable")
    settled = plain.settled(answer, gold) if answer and 0 < len(gold) <= LONGEST_ANSWER else False
    value = _only_value(shown) if gold and line is not None and _is_prose(answer) else None
    verdicts = {answer: settled}
    if value is not None:
        verdicts[value] = plain.settled(value, gold)
    if True in verdicts.values():
        return Grade(True, shown, "correct")
    undecided = [text for text, verdict in verdicts.items() if verdict is None]
    if not undecided:
        return Grade(False, shown, "wrong")
    request = {"shown": shown, "gold": gold, "answer": undecided[0]}
    return request | {"value": value} if value in undecided[1:] else request


def _only_value(sentence: str) -> str | None:
    """The only number or formula of a sentence in tidy notation, with the unit behind it.

    None where there are several, as in "5 or 6", or where words or signs change the value, as in "8 squared".
    """
    clause = _REASON.split(sentence, maxsplit=1)[0]
    found = list(_VALUE.finditer(clause))
    found = [match for match in found if _DIGIT.search(match.group())] or found
    if len(found) != 1:
        return None
    before, behind = clause[: found[0].start()], clause[found[0].end() :]
    if words_before_change_value(before) or words_change_value(behind):
        return None
    if _OPERAND_BEFORE.search(before) or _OPERAND_BEHIND.match(behind):
        return None
    value = tidy(found[0].group().strip("*_,.;:!?"))
    word = _NEXT_WORD.match(behind)
    bare = _DIGIT.search(value) is not None and read_quantity(value).parts[0].unit is None
    return rf"{value}\text{{ {word[1]}}}" if bare and word is not None and unit_of(word[1]) is not None else value


def _is_prose(answer: str) -> bool:
    """Whether an answer has words that are not units, so that its number has to be looked for."""
    return any(word.lower() not in KNOWN and unit_of(word) is None for word in _PROSE.findall(answer))


def is_a_term(number: str, text: str) -> bool:
    """Whether the last `number` in a text is only a term of something longer, such as 2 in "Take 2*14"."""
    if plain_number(number) is None:
        return False
    last = deque(re.finditer(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", text), maxlen=1)
    if not last:
        return False
    before = text[max(0, last[0].start() - CHARACTERS_BEFORE) : last[0].start()]
    return bool(_OPERAND_BEHIND.match(text, last[0].end()) or _OPERAND_BEFORE.search(before))
