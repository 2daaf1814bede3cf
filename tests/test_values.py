"""How the values of settings are read, in files and on the command line."""

from __future__ import annotations

import math

import pytest

from hapo_lite.recipe.settings import parse_override
from hapo_lite.recipe.strict_yaml import load_yaml


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("data.system_prompt=Put the number after ####.", "Put the number after ####."),
        ("data.system_prompt=# Task", "# Task"),
        ("data.system_prompt='a # b'", "a # b"),
        ('model.chat_template_options={style: "#", name: x #y}', {"style": "#", "name": "x #y"}),
    ],
)
def test_nothing_on_the_command_line_is_a_comment(written, read):
    assert parse_override(written)[1] == read


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("010", "010"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1_000", 1000),
        ("-7", -7),
        ("0x1f", 31),
        ("0", 0),
        ("1.5e-3", 0.0015),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
    ],
)
def test_numbers_are_read_as_they_are_written(written, read):
    """By YAML 1.1 010 would be 8, and 1:30 would be 90."""
    found = parse_override(f"key={written}")[1]
    assert found == read and type(found) is type(read)
    assert load_yaml(f"[{written}]") == [read]
