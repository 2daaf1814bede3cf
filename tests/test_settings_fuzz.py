"""Settings files by chance and by malice: whatever the bytes, a valid recipe or one sentence, and soon."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hapo_lite.errors import UserError
from hapo_lite.recipe import Recipe, load_recipe, parse_recipe
from tests.recipes import MINIMAL, SHIPPED

SECONDS = 3.0
TEXTS = [path.read_text(encoding="utf-8") for path in SHIPPED]
BASE = yaml.safe_dump(MINIMAL)
OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def leaves(tree: dict, prefix: str = "") -> list[str]:
    below = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else [prefix + k] for k, v in tree.items()]
    return [name for names in below for name in names]


FIELDS = leaves(Recipe.model_validate(MINIMAL | {"name": "x"}).model_dump())


def floats(tree: object) -> list[float]:
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in floats(value)]
    return [tree] if isinstance(tree, float) else []


def holds(recipe: Recipe) -> None:
    """What every recipe that is let through keeps."""
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert all(map(math.isfinite, floats(recipe.model_dump())))
    assert recipe.run_dir.name == recipe.name and ".." not in recipe.name
    assert recipe.token_budget >= 1
    assert all(isinstance(note, str) for note in recipe.advice())


def read(path, content: bytes | str, overrides: tuple[str, ...] = ()) -> Recipe | None:
    """The recipe, None where there was one sentence instead. Anything else fails the test."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    try:
        recipe = load_recipe(path, overrides)
        holds(recipe)
    except UserError as error:
        recipe = None
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.process_time() - started < SECONDS
    return recipe


def nest(depth: int, width: int, start: str, line: str) -> str:
    """Lines that each refer `width` times to the one before: width ** depth values in a few hundred bytes."""
    names = [f"v{i}" for i in range(depth + 1)]
    lines = [f"{names[0]}: &{names[0]} {start}"]
    for before, name in itertools.pairwise(names):
        lines.append(f"{name}: &{name} " + line.format(", ".join([f"*{before}"] * width)))
    return "\n".join(lines)


BOMBS = {
    "a thousand million laughs": nest(9, 9, "[x]", "[{}]"),
    "merged keys": nest(9, 9, "{k: 1}", "{{<<: [{}]}}"),
    "itself": BASE + "seed: &a [*a]",
    "open brackets": "[" * 30_000,
    "open braces": "{a: " * 7_000,
    "dashes": "- " * 15_000,
    "question marks": "? " * 15_000,
    "anchors": "&a " * 10_000,
    "a key of 30,000 letters": BASE + f"? {'k' * 30_000}\n: 1",
    "a value of 30,000 letters": BASE + f"seed: {'k' * 30_000}",
    "a number of 30,000 digits": BASE + "seed: " + "9" * 30_000,
    "a sexagesimal number": BASE + "seed: 1" + ":59" * 7_000,
    "2,000 unknown keys": BASE + "\n".join(f"k{i}: 1" for i in range(2_000)),
    "a megabyte": BASE + "# " + "x" * 1_000_000,
    "no end": b"\xff" * 100_000,
    "a date that is none": BASE + "seed: 2001-99-99",
    "an integer that is none": BASE + "seed: !!int x",
    "a truth that is none": BASE + "seed: !!bool x",
    "a moment that is none": BASE + "seed: !!timestamp x",
    "a preset that is a list": BASE + "method: {preset: [hapo]}",
    "a name of half a character": BASE + 'name: "\\ud800"',
    "a folder of half a character": BASE + 'output_dir: "\\ud800"',
    "a folder with a NUL": BASE + 'output_dir: "a\\0b"',
    "an infinite reward": BASE + "reward: {correct: .inf}",
    "a reward that is no number": BASE + "reward: {wrong: .nan}",
    "an infinite bonus": BASE + "method: {entropy_bonus: .inf}",
    "a seed beyond 32 bits": BASE + "seed: 4294967296",
    "python": BASE + "seed: !!python/object/apply:os.system [touch owned]",
    "python by name": BASE + "reward: {function: !!python/name:os.system }",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_are_one_sentence(tmp_path, content):
    assert read(tmp_path / "recipe.yaml", content) is None
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@OFTEN
@given(content=st.one_of(st.binary(), st.text(), st.text(alphabet="&*!|>{}[]:,-?'\"%@#<=~\n \tab01.\\")))
def test_any_bytes(tmp_path, content):
    read(tmp_path / "recipe.yaml", content)


PIECES = [
    "*a",
    "&a ",
    "!!",
    "!!int ",
    "{",
    "}",
    "[",
    "]",
    ": ",
    "\n",
    "  ",
    "- ",
    "null",
    ".inf",
    ".nan",
    "-1",
    "1e999",
]
PIECES += [
    "'",
    '"',
    "|",
    "2001-01-01",
    "true",
    "<<: ",
    "\t",
    "\0",
    "\ud800",
    "٣",
    "0x10",
    "1_000",
    "~",
    "%",
    "@",
    "=",
    "0o9",
]


@OFTEN
@given(st.data())
def test_shipped_recipes_with_pieces_lost_doubled_and_put_in(tmp_path, data):
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 40)))
        piece = data.draw(st.sampled_from(["", text[start:end] * 2, *PIECES]))
        text = text[:start] + piece + text[end:]
    read(tmp_path / "recipe.yaml", text)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from([2**40, 10**30, 1e-300, 1e300, "1", "nan", "tiny", "../x", "/", "a/b", "\0", "\ud800", ""]),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(SCALARS, v, max_size=3), max_leaves=5
)


@OFTEN
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=4))
@example({"method.preset": ["hapo"]})
@example({"training.learning_rate": math.inf})
def test_any_value_in_any_field(changes):
    tree = {**{k: dict(v) for k, v in MINIMAL.items()}, "name": "x"}
    for field, value in changes.items():
        target = tree
        *sections, last = field.split(".")
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    try:
        recipe = parse_recipe(tree)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        holds(recipe)


@OFTEN
@given(key=st.one_of(st.sampled_from(FIELDS), st.text()), value=st.one_of(st.text(), st.sampled_from(PIECES)))
@example(key="seed", value="2001-99-99")
@example(key="seed", value="[" * 5000)
@example(key="a" * 5000, value="1")
def test_any_override(tmp_path, key, value):
    read(tmp_path / "recipe.yaml", BASE, (f"{key}={value}",))
