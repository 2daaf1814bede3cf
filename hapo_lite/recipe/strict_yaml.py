"""Plain YAML that is safe to read from anyone: no aliases, no repeated keys, no Python objects, a limit on depth."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

_HASH = "\ue000"
"""Stands for # while a value is read: a character for private use."""
DEEPEST = 20
"""Largest nesting of mappings and lists; the shipped recipes need four levels."""


def load_yaml(text: str) -> Any:
    """The value that a YAML text stands for. Raises yaml.YAMLError, and no other error, whatever the text is."""
    return yaml.load(text, Loader=_StrictLoader)


def load_value(text: str) -> Any:
    """The same for a value on the command line, where nothing is a comment: `#` is a character like others."""
    return _with_hashes(load_yaml(text.replace("#", _HASH)))


def _with_hashes(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_HASH, "#")
    if isinstance(value, list):
        return [_with_hashes(item) for item in value]
    if isinstance(value, dict):
        return {_with_hashes(key): _with_hashes(item) for key, item in value.items()}
    return value


def problem_of(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text, in one line of at most 200 characters."""
    return " ".join(str(getattr(error, "problem", None) or error).split())[:200]


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?"
    r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
}


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses aliases, a key that stands twice in a mapping, and deep nesting.

    A few lines of aliases can stand for thousands of millions of values. Numbers are those of YAML 1.2, where 010 is
    not 8 and 1:30 is not 90.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # untyped in PyYAML's stubs
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "an alias (*name): write the value out", mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise ComposerError(None, None, "nested too deeply", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            # PyYAML passes on Python's own error for `2001-99-99`, `!!int x` or a number of 5,000 digits.
            raise ConstructorError(
                None, None, f"a value that is no {node.tag.rsplit(':', 1)[-1]}", node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                continue
            if key in seen:
                raise ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _NUMBERS]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _StrictLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+0123456789."))
