"""Strict settings files: YAML in, a frozen pydantic model out, and one sentence about whatever is wrong.

Nothing here knows a section by name: a subclass of `Section` says what its fields are.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from hapo_lite.errors import UserError
from hapo_lite.recipe.elsewhere import answer_for
from hapo_lite.recipe.fields import fields_at, leaves
from hapo_lite.recipe.strict_yaml import load_value, load_yaml, problem_of

LARGEST_FILE = 1 << 15
"""Largest settings file, bytes; the longest that is shipped has 2,000."""


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """A mapping of known fields and no others."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or any("\ud800" <= c <= "\udfff" for c in text)):
                raise ValueError("holds a character that no file name, prompt or setting can have")
        return value

    @classmethod
    def section_from_value(cls, name: str, value: Any) -> Any:
        """The mapping that a single value of the section `name` is short for; `value` itself where it is not.

        A subclass overrides this, so that a section may be written as one value and still be changed field by field.
        """
        return value


Model = TypeVar("Model", bound=Section)


def read_mapping(path: Path, what: str, sections: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError with one sentence.

    what: what the file is called in that sentence, such as `recipe`. sections: two of its sections, to show how it is
    written.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no {what} at {path}{_nearest_file(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the {what} {path} cannot be read: {error}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} is larger than {LARGEST_FILE:,} bytes, which is no {what}: check the path")
    try:
        settings = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {problem_of(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a {what} is a mapping of sections, such as {sections}")
    return settings


def validate(model: type[Model], settings: dict[str, Any], where: str, overrides: Iterable[str] = ()) -> Model:
    """`settings` as a `model`. Raises UserError that names `where` and the first field that is wrong.

    overrides: those of the command line within the settings. A wrong field that one of them has set is said to be the
    command line's.
    """
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        problems = error.errors()
        if any(_is_set_by(override, problems[0]) for override in overrides):
            where = "the command line"
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {_sentence(problems[0], model)}{more}") from None


def _is_set_by(override: str, detail: ErrorDetails) -> bool:
    """Whether `section.key=value` has set the field that pydantic found wrong, or made a section that is unknown."""
    key = override.partition("=")[0].split(".")
    place = [str(part) for part in detail["loc"]]
    return place[: len(key)] == key or (detail["type"] == "extra_forbidden" and key[: len(place)] == place)


def apply_override(model: type[Section], settings: dict[str, Any], override: str) -> None:
    """Change `settings` of a `model` by one `section.key=value` of the command line. Raises UserError."""
    key, value = parse_override(override)
    put(model, settings, key, value, override)


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`, the value as YAML reads it. Raises UserError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{_shown(override)} is not an override: write section.key=value")
    try:
        return key, load_value(value)
    except yaml.YAMLError:
        raise UserError(f"{_shown(override)}: {_shown(value)} is not a YAML value") from None


def put(model: type[Section], settings: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set the dotted `key` in `settings` of a `model`, making the sections that are missing. Raises UserError.

    shown: how the user wrote the change, for the sentence.
    """
    target = settings
    *sections, last = key.split(".")
    for depth, section in enumerate(sections, start=1):
        below = model.section_from_value(section, target.get(section))
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise UserError(f"{_shown(shown)}: {'.'.join(sections[:depth])} is a single value, not a section")
        target[section] = below
        target = below
    target[last] = value


def nearest(word: str, known: Iterable[str], section: str = "", model: type[Section] | None = None) -> str:
    """A clause: `; did you mean ...?`, or the known words.

    section: where the known words belong, as a prefix. model: where to look for a field called `word` if none of the
    known words is close.
    """
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {section + '.' if section else ''}{close[0]}?"
    if section or not known:
        return f"; known are {', '.join(known)}" if known else ""
    elsewhere = [field.name for field in leaves(model) if field.name.split(".")[-1] == word] if model else []
    return f"; did you mean {elsewhere[0]}?" if elsewhere else ""


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist"
    siblings = sorted(p.name for p in path.parent.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _sentence(detail: ErrorDetails, model: type[Section]) -> str:
    """What pydantic found wrong with one field of a `model`."""
    location = [_part(part) for part in detail["loc"]]
    name = ".".join(location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return _not_a_field(location, detail["input"], model)
    if detail["type"] == "missing":
        sentence = f"{name} is missing and has no default"
        section = fields_at(model, location[:-2]).get(location[-2]) if len(location) > 1 else None
        if section is not None and section.may_be_null and detail["input"]:
            # Another of its fields has made the section.
            given = ".".join([*location[:-1], _part(next(iter(detail["input"])))])
            sentence += f": give it too, since {given} is set"
        return sentence
    message = detail["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    message = re.sub(r"a valid dictionary or instance of \w+", "a mapping of settings", message)
    if not name:
        return message
    if detail["type"] == "value_error":
        return f"{name}: {message}"
    field = fields_at(model, location[:-1]).get(location[-1])
    if field is not None and field.may_be_null:
        message += ", or null"
    return f"{name} = {_shown(detail['input'])}: {message[0].lower()}{message[1:]}"


def _not_a_field(location: list[str], value: Any, model: type[Section]) -> str:
    """The sentence about an unknown field of a `model`: what it is called here, or the field that was meant."""
    whole = list(location)
    while isinstance(value, dict) and value:  # such as {"rank": 8} in an unknown section `lora`
        key, value = next(iter(value.items()))
        whole.append(_part(key))
    name = ".".join(location)
    if answer := answer_for(".".join(whole)):
        return f"{'.'.join(whole)} is not a field; {answer}"
    names = [field.name for field in leaves(model)]
    for start in range(len(whole)):
        meant = [found for found in names if found.endswith(f".{'.'.join(whole[start:])}")]
        if meant:
            shortest = min(found.count(".") for found in meant)
            same = [found for found in meant if found.count(".") == shortest]
            return f"{'.'.join(whole)} is not a field; did you mean {' or '.join(same)}?"
    known = fields_at(model, location[:-1])
    return f"{name} is not a field{nearest(location[-1], known, '.'.join(location[:-1]), model)}"


def _part(key: Any) -> str:
    """One part of a dotted name for a sentence."""
    return key if isinstance(key, str) and key.isidentifier() and len(key) < 60 else _shown(key)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _shown(value: Any) -> str:
    """A value for a sentence: short, on one line, whatever it holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits.
        return f"a huge {type(value).__name__}"
