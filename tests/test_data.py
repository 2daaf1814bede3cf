"""Data sets: the schemas that must read, the rows that are left out, and what the user is told."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hapo_lite.errors import UserError
from hapo_lite.recipe import DataSettings
from hapo_lite.records import Prompt
from hapo_lite.tasks.data import Column, load_prompts, split_held_out
from tests.rows import jsonl, load

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the checkout")


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "first_id", "first_answer", "repeated"),
    [
        ("gsm8k_train", 7473, "gsm8k_train-0", "72", 0),
        ("gsm8k_test", 1319, "gsm8k_test-0", "18", 0),
        ("aime24", 30, "aime24-0", "204", 0),
        ("amc23", 83, "amc23-0", "142", 0),
        ("math500", 500, "math500-0", r"\left( 3, \frac{\pi}{2} \right)", 0),
        ("minerva", 272, "minerva-0", "9.6", 0),
        ("olympiadbench", 675, "olympiadbench-0", "2", 0),
        ("deepscaler_hard_1k", 990, "deepscaler_hard_1k-0", "8", 10),
        ("dapo_schema_aime_2024", 30, "dapo_schema_aime_2024-0", "540", 930),
    ],
)
def test_the_real_files_read(name, count, first_id, first_answer, repeated):
    found = load(DATA / f"{name}.parquet")
    assert (len(found.prompts), found.prompts[0].id, found.prompts[0].answer) == (count, first_id, first_answer)
    assert sum(found.skipped.values()) == repeated
    assert len({p.id for p in found.prompts}) == count


@needs_data
def test_gsm8k_answers_are_numbers_without_commas():
    prompts = load(DATA / "gsm8k_train.parquet").prompts
    assert all(p.answer.lstrip("-").replace(".", "", 1).isdigit() for p in prompts)
    assert any(float(p.answer) >= 1000 for p in prompts)


def test_the_built_in_task():
    train, test = load("tiny").prompts, load("tiny", split="test").prompts
    assert train[0].messages[-1][1].endswith("=?")
    assert not {p.messages for p in train} & {p.messages for p in test}
    assert not {p.id for p in train} & {p.id for p in test}
    assert load("tiny").prompts == train
    with pytest.raises(UserError, match=r"data.split.*'train' and 'test', not 'dev'"):
        load("tiny", split="dev")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, suffix):
    path = tmp_path / f"mine{suffix}"
    rows = [{"question": "How many,\n“really”?", "answer": "007"}, {"question": "And now?", "answer": "1/2"}]
    if suffix == ".jsonl":
        path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif suffix == ".csv":
        path.write_text('question,answer\n"How many,\n“really”?",007\nAnd now?,1/2\n', encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert load(path, system_prompt=None).prompts == (
        Prompt("mine-0", (("user", "How many,\n“really”?"),), "007"),
        Prompt("mine-1", (("user", "And now?"),), "1/2"),
    )


def test_system_prompt_comes_first_unless_the_data_has_one(tmp_path):
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "a"}]
    turns = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
    path = jsonl(
        tmp_path, {"prompt": own, "answer": "1"}, {"prompt": turns, "answer": "2"}, {"prompt": "e", "answer": "3"}
    )
    first, second, third = load(path, system_prompt="House.").prompts
    assert first.messages == (("system", "Own."), ("user", "a"))
    assert second.messages == (("system", "House."), ("user", "b"), ("assistant", "c"), ("user", "d"))
    assert third.messages == (("system", "House."), ("user", "e"))
    assert load(path, system_prompt=None).prompts[2].messages == (("user", "e"),)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (42, "42"),
        (42.0, "42"),
        (0.5, "0.5"),
        (["42"], "42"),
        ("She has 1 + 1.\n#### -1,234.5", "-1234.5"),
        ("#### 3,4", "3,4"),
        (r"Thus \boxed{1} is not, but \boxed{\frac{1}{2}} is.", r"\frac{1}{2}"),
        ("  42\n", "42"),
    ],
)
def test_answers_become_gold_text(tmp_path, answer, gold):
    assert load(jsonl(tmp_path, {"problem": "p", "answer": answer})).prompts[0].answer == gold


def test_unusable_rows_are_left_out_and_counted(tmp_path):
    path = jsonl(
        tmp_path,
        {"problem": "kept", "answer": "1", "id": 7},
        {"problem": "kept", "answer": "1"},
        {"problem": " ", "answer": "1"},
        {"problem": None, "answer": "1"},
        {"answer": "1"},
        {"problem": 5, "answer": "1"},
        {"problem": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
        {"problem": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "1"}], "answer": "1"},
        {"problem": "a", "answer": None},
        {"problem": "b", "answer": "####  "},
        {"problem": "c", "answer": float("nan")},
        {"problem": "d", "answer": ["1", "2"]},
        {"problem": "e", "answer": "1" * 3000},
        {"problem": "last", "answer": "2", "id": 7},
    )
    found = load(path)
    assert [p.id for p in found.prompts] == ["7", "rows-13"]
    assert found.skipped == {
        "the same problem as an earlier row": 1,
        "no problem": 3,
        "the problem is neither text nor a chat": 2,
        "the chat does not end with the user": 1,
        "no answer": 3,
        "the answer is a list of several": 1,
        "the answer is longer than 2,000 characters": 1,
    }


def test_limit_counts_prompts_that_are_kept(tmp_path):
    path = jsonl(tmp_path, *({"problem": p, "answer": "1"} for p in ("a", "a", "", "b", "c")))
    assert [p.messages[-1][1] for p in load(path, limit=2).prompts] == ["a", "b"]


def test_columns_may_be_named(tmp_path):
    path = jsonl(tmp_path, {"prompt": "no", "meta": {"text": "yes"}, "a.b": "1", "answer": "no"})
    prompt = load(path, problem_column="meta.text", answer_column="a.b", system_prompt=None).prompts[0]
    assert prompt == Prompt("rows-0", (("user", "yes"),), "1")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_file_may_be_separated_by_commas_semicolons_or_tabs(tmp_path, separator):
    rows = [["problem", "answer"], ["1;2,3\t4", "5"], ["6", "1,000"]]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    found = load(tmp_path / "rows.csv").prompts
    assert [(p.messages[-1][1], p.answer) for p in found] == [("1;2,3\t4", "5"), ("6", "1,000")]


def test_columns_are_found_whatever_their_case_and_outer_spaces(tmp_path):
    (tmp_path / "rows.csv").write_text("Problem, Answer, LEVEL\n1+1=?, 2, easy\n")
    row = {"Problem": "1+1=?", " Answer": " 2", " LEVEL": " easy"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    jsonl(tmp_path, row)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    asked = [Column("level", "the reward f", required=True)]
    for suffix in ("csv", "json", "jsonl", "parquet"):
        for named in ({}, {"problem_column": "PROBLEM ", "answer_column": "answer"}):
            data = DataSettings(source=str(tmp_path / f"rows.{suffix}"), system_prompt=None, **named)
            [found] = load_prompts(data, asked).prompts
            assert found == Prompt("rows-0", (("user", "1+1=?"),), "2", columns={"level": " easy"})
    # A message names the columns as the file has them.
    with pytest.raises(UserError, match=r"no column 'riddle'.* it has Problem,  Answer,  LEVEL"):
        load(tmp_path / "rows.csv", problem_column="riddle")


def test_a_column_that_is_spelled_exactly_comes_first(tmp_path):
    path = jsonl(tmp_path, {"Prompt": "no", "PROBLEM": "no", "problem": "yes", "Answer": "0", "answer": "1"})
    prompt = load(path, system_prompt=None).prompts[0]
    assert prompt == Prompt("rows-0", (("user", "yes"),), "1")


def test_rows_that_are_left_out_are_counted_and_the_first_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("problem,answer\n1,1\n2,\n1,1\n3,\n")
    assert load(tmp_path / "rows.csv").left_out() == [
        "2 rows left out: no answer (first in row 2 below the header)",
        "1 row left out: the same problem as an earlier row (row 3 below the header)",
    ]
    path = jsonl(tmp_path, {"problem": "1", "answer": "1"}, {"problem": "", "answer": "1"})
    assert load(path).left_out() == ["1 row left out: no problem (row 2)"]


def test_messages_to_the_user(tmp_path):
    good = jsonl(tmp_path, {"problem": "p", "meta": {"gold": "1"}})
    for name, content in {
        "empty.jsonl": b"",
        "header.csv": b"problem,answer\n",
        "headless.csv": b"12+7=?,19\n1+1=?,2\n",
        "comma.csv": b"problem,answer\n1+1=?,2\n999+235=?,1,234\n",
        "utf16.csv": "problem,answer\n1+1=?,2\n".encode("utf-16"),
        "binary.jsonl": b"\xff\xfe\x00",
        "broken.jsonl": b'{"problem": "p", "answer": "1"}\n{"problem": \n',
        "list.json": b"[1, 2]",
        "deep.json": b"[" * 100_000,
        "not.parquet": b"no parquet",
        "blank.jsonl": b'{"problem": "", "answer": "1"}\n',
        "notes.txt": b"hello",
    }.items():
        (tmp_path / name).write_bytes(content)
    for source, settings, complaint in [
        (tmp_path / "row.jsonl", {}, r"there is no data file .*row\.jsonl; did you mean .*rows\.jsonl\?"),
        (tmp_path / "no" / "rows.jsonl", {}, r"the folder .*no does not exist"),
        (tmp_path / "nothing", {}, r"there is no data file .*nothing"),
        (tmp_path, {}, r"is a folder: name one of its \.parquet"),
        (tmp_path / "notes.txt", {}, r"ends in \.txt: use one of \.parquet"),
        (good, {}, r"none of the columns reward_model\.ground_truth, answer, solution: set data\.answer_column"),
        (
            good,
            {"answer_column": "meta.gol"},
            r"no column 'meta\.gol'.*problem, meta, meta\.gold; did you mean meta\.gold\?",
        ),
        (good, {"answer_column": "meta"}, r"no usable row .*neither text nor a number: 1"),
        (tmp_path / "empty.jsonl", {}, "has no rows"),
        (tmp_path / "header.csv", {}, "has no rows"),
        (
            tmp_path / "headless.csv",
            {},
            r"its first line was taken as their names: .*set data\.problem_column to one of 12\+7=\?, 19",
        ),
        (tmp_path / "comma.csv", {}, "line 3 has 3 fields and the first line 2: a field that contains ','"),
        (tmp_path / "utf16.csv", {}, r"cannot be read \('utf-8' codec .*: save it as UTF-8 text"),
        (tmp_path / "binary.jsonl", {}, r"binary\.jsonl cannot be read"),
        (tmp_path / "broken.jsonl", {}, r"cannot be read \(line 2: "),
        (tmp_path / "list.json", {}, r"cannot be read \(entry 1 is not an object"),
        (tmp_path / "deep.json", {}, r"deep\.json cannot be read"),
        (tmp_path / "not.parquet", {}, r"not\.parquet cannot be read .*check that it is a \.parquet file"),
        (tmp_path / "blank.jsonl", {}, r"no usable row .*no problem: 1"),
    ]:
        with pytest.raises(UserError, match=complaint) as caught:
            load(source, **settings)
        assert "\n" not in str(caught.value)


def test_a_hub_data_set_out_of_reach_is_one_sentence(tmp_path):
    program = (
        "from hapo_lite.tasks.data import load_prompts, UserError\n"
        "from hapo_lite.recipe import DataSettings\n"
        "try: load_prompts(DataSettings(source='nobody/nothing', config='main'))\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith("the hub data set 'nobody/nothing main', split 'train', cannot be loaded (")
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


def test_every_prompt_has_an_id_of_its_own(tmp_path):
    """Rows whose ids look like the numbers of others, and one that stands twice."""
    ids = [f"math-{i}" for i in (1, 2, 3, 4, 4, 0, 6, 6, 5)]
    rows = [{"id": name, "problem": f"{i}?", "answer": "1"} for i, name in enumerate(ids)]
    prompts = load_prompts(DataSettings(source=str(jsonl(tmp_path, *rows, name="math.jsonl")))).prompts
    assert len({prompt.id for prompt in prompts}) == len(rows)
    assert [prompt.id for prompt in prompts][:4] == ids[:4]


def test_held_out_rows_are_disjoint_and_repeatable():
    prompts = [Prompt(str(i), (("user", str(i)),), "1") for i in range(50)]
    train, held_out = split_held_out(prompts, 10, seed=3)
    assert (len(train), len(held_out)) == (40, 10)
    assert {*train, *held_out} == set(prompts)
    assert split_held_out(prompts, 10, seed=3) == (train, held_out)
    assert split_held_out(prompts, 10, seed=4)[1] != held_out
    assert split_held_out(prompts, 0, seed=3) == (tuple(prompts), ())
    with pytest.raises(UserError, match="50 prompts are to be held out and there are only 50"):
        split_held_out(prompts, 50, seed=3)
