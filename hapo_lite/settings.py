"""Strict settings files: YAML in, a frozen pydantic model out, and one sentence about whatever is wrong."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from hapo_lite.errors import UserError


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


LARGEST_FILE = 1 << 15
"""Bytes of a settings file; the longest that is shipped has 2,000."""
DEEPEST = 20
"""Sections in sections; recipes have four."""
Model = TypeVar("Model", bound=Section)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file. what: `recipe` or `comparison`, for the sentences. Raises UserError."""
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
        settings = _load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {_problem(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: a {what} is a mapping of sections, such as `model:` and `training:`")
    return settings


def validate(model: type[Model], settings: dict[str, Any], where: str) -> Model:
    """`settings` as a `model`. Raises UserError that names `where` and the first field that is wrong."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        problems = [_sentence(detail, model) for detail in error.errors()]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{where}: {problems[0]}{more}") from None


def describe(model: type[Section]) -> str:
    """Every field of a model with its type, default and meaning, one line each."""
    return "\n".join(f"  {name} ({kind}, {default}): {meaning}" for name, kind, default, meaning in _walk(model))


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Change `settings` by one `section.key=value` of the command line. Raises UserError."""
    key, value = parse_override(override)
    put(settings, key, value, override)


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`, the value as YAML reads it. Raises UserError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{_shown(override)} is not an override: write section.key=value")
    try:
        return key, _load_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"{_shown(override)}: {_shown(value)} is not a YAML value") from None


def put(settings: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set the dotted `key`, making sections on the way. shown: how the user wrote it, for the sentence."""
    target = settings
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        below = target.get(section)
        if section == "method" and isinstance(below, str):
            below = {"preset": below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            section = ".".join(sections[: depth + 1])
            raise UserError(f"{_shown(shown)}: {section} is a single value, not a section")
        target[section] = below
        target = below
    target[last] = value


def _load_yaml(text: str) -> Any:
    """Plain YAML as Python. Raises YAMLError, and nothing else, whatever the text is."""
    return yaml.load(text, Loader=_StrictLoader)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key may stand only once in a mapping, nothing refers to anything else, and depth has an end.

    A few lines of references can stand for thousands of millions of values.
    """

    depth = 0

    def compose_node(self, parent, index):
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*name): write the value out", mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            # PyYAML lets through what Python says to `2001-99-99`, `!!int x` or a number of 5,000 digits.
            raise yaml.constructor.ConstructorError(
                None, None, f"a value that is no {node.tag.rsplit(':', 1)[-1]}", node.start_mark
            ) from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong, in one line."""
    return " ".join(str(getattr(error, "problem", None) or error).split())[:200]


def _shown(value: Any) -> str:
    """A value for a sentence: short, on one line, whatever it holds."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits.
        return f"a huge {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def _sentence(detail: dict[str, Any], model: type[Section]) -> str:
    location = [part if str(part).isidentifier() and len(part) < 60 else _shown(part) for part in detail["loc"]]
    name = ".".join(location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _fields_at(model, location[:-1])
        return f"{name} is not a field{nearest(location[-1], known, '.'.join(location[:-1]), model)}"
    if detail["type"] == "missing":
        return f"{name} is missing and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if detail["type"] == "value_error":
        return f"{name}: {message}"
    return f"{name} = {_shown(detail['input'])}: {message[0].lower()}{message[1:]}"


def nearest(word: str, known: Iterable[str], section: str = "", model: type[Section] | None = None) -> str:
    """A clause: `; did you mean ...?`, or what is known; also where in `model` a field of that name is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {section + '.' if section else ''}{close[0]}?"
    if section or not known:
        return f"; known are {', '.join(known)}" if known else ""
    elsewhere = [name for name, *_ in _walk(model) if name.split(".")[-1] == word] if model else []
    return f"; did you mean {elsewhere[0]}?" if elsewhere else ""


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f": the folder {path.parent} does not exist"
    siblings = sorted(p.name for p in path.parent.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _model_of(annotation: Any) -> type | None:
    """The settings class inside a field's annotation, such as DataSettings in `DataSettings | None`.

    A list of settings has no dotted keys, so there is none inside `tuple[SuiteSettings, ...]`.
    """
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and (issubclass(candidate, BaseModel) or dataclasses.is_dataclass(candidate)):
            return candidate
    return None


def _fields_at(root: type, location: list[str]) -> list[str]:
    model: type | None = root
    for part in location:
        children = {name: sub for name, _, _, _, sub in _children(model)} if model else {}
        model = children.get(part)
    return [name for name, *_ in _children(model)] if model else []


def _children(model: type):
    """(name, type text, default text, meaning, nested model) of each field."""
    if dataclasses.is_dataclass(model):
        for f in dataclasses.fields(model):
            yield f.name, str(f.type), f"default {f.default}", f.metadata["help"], None
        return
    for name, info in model.model_fields.items():
        default = "required" if info.is_required() else f"default {_show(info.default)}"
        yield name, _type_text(info.annotation), default, info.description or "", _model_of(info.annotation)


def _walk(model: type, prefix: str = ""):
    for name, kind, default, meaning, nested in _children(model):
        if nested is None:
            yield prefix + name, kind, default, meaning
        else:
            yield from _walk(nested, f"{prefix}{name}.")


def _show(default: Any) -> str:
    return "null" if default is None else str(default)


def _type_text(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_text(get_args(annotation)[0])
    if origin is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " | ".join(_type_text(a) for a in get_args(annotation))
    if annotation is type(None):
        return "null"
    if origin is tuple:
        return "list"
    return getattr(annotation, "__name__", str(annotation))
