"""The fields of a section class as text: their dotted names, types, defaults and meanings."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field is called, and its type, default and meaning as text. section: the class of the section in it."""

    name: str
    kind: str
    default: str
    meaning: str
    section: type | None = None

    @property
    def may_be_null(self) -> bool:
        """Whether null is a value of the field."""
        return self.kind.endswith(" | null")


def describe(section: type[BaseModel]) -> str:
    """Every field of a section, and of the sections in it, with its type, default and meaning, one line each."""
    return "\n".join(f"  {field.name} ({field.kind}, {field.default}): {field.meaning}" for field in leaves(section))


def leaves(section: type, prefix: str = "") -> Iterator[Field]:
    """The fields of a section and of the sections in it that hold a value, by their dotted names."""
    for field in fields_of(section):
        if field.section is None:
            yield dataclasses.replace(field, name=prefix + field.name)
        else:
            yield from leaves(field.section, f"{prefix}{field.name}.")


def fields_at(root: type, location: list[str]) -> dict[str, Field]:
    """The fields of the section at `location`, by name; none where there is no such section."""
    section: type | None = root
    for part in location:
        inner = {field.name: field.section for field in fields_of(section)} if section else {}
        section = inner.get(part)
    return {field.name: field for field in fields_of(section)} if section else {}


def fields_of(section: type) -> Iterator[Field]:
    """The fields of a section class, which may be a dataclass whose fields have a `help` in their metadata."""
    if issubclass(section, BaseModel):
        for name, info in section.model_fields.items():
            default = f"default {_text_of(info.get_default(call_default_factory=True, validated_data={}))}"
            yield Field(
                name,
                _type_text(info.annotation),
                "required" if info.is_required() else default,
                info.description or "",
                _section_in(info.annotation),
            )
    elif dataclasses.is_dataclass(section):
        kinds = get_type_hints(section)
        for field in dataclasses.fields(section):
            default = f"default {_text_of(field.default)}"
            yield Field(field.name, _type_text(kinds[field.name]), default, field.metadata["help"])


def _section_in(annotation: Any) -> type | None:
    """The section class inside a field's annotation: `A` in `A` and in `A | None`, none in `tuple[A, ...]`.

    A list of sections has no dotted keys.
    """
    parts = () if get_origin(annotation) is tuple else get_args(annotation)
    for candidate in (annotation, *parts):
        if isinstance(candidate, type) and (issubclass(candidate, BaseModel) or dataclasses.is_dataclass(candidate)):
            return candidate
    return None


def _text_of(default: Any) -> str:
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
