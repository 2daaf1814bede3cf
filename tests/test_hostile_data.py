"""Data sets from strangers and of any size: what is read a piece at a time, left out and counted, or refused."""

from __future__ import annotations

import decimal
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hapo_lite.errors import UserError
from hapo_lite.records import EncodedPrompt, Prompt
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.tasks import sources, store
from hapo_lite.tasks.data import split_held_out
from hapo_lite.tasks.store import PromptStore, digest_of
from hapo_lite.tasks.stream import LazyPrompts, PromptStream
from tests.conftest import ROOT
from tests.rows import jsonl, load


def prompt(i: int) -> Prompt:
    return Prompt(str(i), (("system", "s"), ("user", f"problem {i}")), str(i))


def test_rows_of_every_bad_kind_are_counted(tmp_path):
    long = "x" * (32 * 1024 + 1)
    path = jsonl(
        tmp_path,
        {"problem": "good", "answer": "1"},
        {"problem": "half a character \ud800", "answer": "1"},
        {"problem": "answer", "answer": "\udfff"},
        {"problem": long, "answer": "1"},
        {"problem": {"text": "p"}, "answer": "1"},
        {"problem": ["p"], "answer": "1"},
        {"problem": True, "answer": "1"},
        {"problem": "a list", "answer": ["1", "2"]},
        {"problem": "a mapping", "answer": {"value": 1}},
        {"problem": "no list", "answer": []},
        {"problem": "a list of one", "answer": [2.0]},
        {"problem": "id", "answer": "3", "id": "x" * 1000},
        {"problem": "id 2", "answer": "4", "id": ["list"]},
        {"problem": "id 3", "answer": "5", "id": "rows-0"},
        {"problem": "good", "answer": "6"},
    )
    found = load(path, system_prompt=None)
    assert [(p.id, p.answer) for p in found.prompts] == [
        ("rows-0", "1"),
        ("rows-10", "2"),
        ("rows-11", "3"),
        ("rows-12", "4"),
        ("rows-13", "5"),
    ]
    assert found.skipped == {
        "text that is not Unicode": 2,
        "longer than 32,768 characters, 32 for each of data.max_prompt_tokens": 1,
        "the problem is neither text nor a chat": 3,
        "the answer is a list of several": 1,
        "the answer is neither text nor a number": 1,
        "no answer": 1,
        "the same problem as an earlier row": 1,
    }


def test_parquet_values_that_are_no_text(tmp_path):
    answers = [decimal.Decimal("1.50"), decimal.Decimal("2.00"), None]
    table = pa.table({"problem": pa.array(["a", "b", "c"]), "answer": pa.array(answers), "blob": [b"\xff", b"", None]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [p.answer for p in load(tmp_path / "rows.parquet").prompts] == ["1.50", "2.00"]
    with pytest.raises(UserError, match=r"no usable row .*neither text nor a chat"):
        load(tmp_path / "rows.parquet", problem_column="blob")


def test_bytes_that_are_no_utf8_are_refused_wherever_they_stand(tmp_path):
    data = b"fineb\xffad"
    offsets = pa.array([0, 4, 8], pa.int32()).buffers()[1]
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(data))
    pq.write_table(pa.table({"problem": text, "answer": ["1", "2"]}), tmp_path / "rows.parquet")
    rows = [json.dumps({"problem": f"p{i}", "answer": "1"}).encode() for i in range(3000)]
    rows[2500] = b'{"problem": "\xff", "answer": "1"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "rows.csv").write_bytes(b"problem,answer\np,1\n" * 3000 + b"\xff,1\n")
    (tmp_path / "rows.json").write_bytes(b'[{"problem": "\xff"}]')
    for name, reason in {".parquet": "", ".jsonl": "line 2501: ", ".csv": "", ".json": ""}.items():
        with pytest.raises(UserError, match=rf"rows\{name} cannot be read \({reason}'utf-8' codec") as caught:
            load(tmp_path / f"rows{name}")
        assert "\n" not in str(caught.value)


def test_lines_without_end_and_without_bottom(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LONGEST_LINE", 1000)
    path = tmp_path / "rows.jsonl"
    for content, reason in {
        b'{"problem": "' + b"x" * 2000: "line 1 is longer than 1,000 bytes",
        b'{"problem": ' + b"9" * 900: r"line 1: ",
        b'{"problem": "p", "answer": "1"}\n' + b"[" * 999: "line 2: |recursion",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"cannot be read \((?i:{reason})"):
            load(path)
    path.write_bytes(b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"line 1: .*4300 digits"):
        load(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "#### 7"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "user"]), v, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({}, optional={"problem": JSON, "answer": JSON, "id": JSON}), max_size=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_whatever_the_rows_hold_each_is_kept_or_counted(tmp_path, rows):
    path = jsonl(tmp_path, {"problem": "first", "answer": "1"}, *rows)
    found = load(path)
    assert len(found.prompts) + sum(found.skipped.values()) == len(rows) + 1
    assert len({p.id for p in found.prompts}) == len({p.messages for p in found.prompts}) == len(found.prompts)
    for p in found.prompts:
        assert p.answer.strip() and p.messages[-1][0] == "user" and p.messages[-1][1].strip()
        json.dumps([p.id, p.messages, p.answer], ensure_ascii=False).encode()


def test_a_hub_data_set_is_read_by_tables(tmp_path):
    rows = {"problem": [f"p{i}" for i in range(2500)], "answer": [str(i) for i in range(2500)]}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "set" / "train.parquet")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home")}
    program = (
        "from hapo_lite.tasks.sources import _hub\n"
        "from hapo_lite.recipe import DataSettings\n"
        f"table = _hub(DataSettings(source={str(tmp_path / 'set')!r}))\n"
        "rows = list(table.read(('problem', 'answer')))\n"
        "print(table.columns, len(rows), rows[2400])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "['problem', 'answer'] 2500 {'problem': 'p2400', 'answer': '2400'}", done.stderr


# --------------------------------------------------------------------------------------------------------- in numbers

GROWTH = """
import sys
from pathlib import Path
from hapo_lite.recipe import DataSettings
from hapo_lite.tasks.data import load_prompts, split_held_out
# Not ru_maxrss, which a process inherits from its parent.
megabytes = lambda name: int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024
import pyarrow.parquet
for path in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = megabytes("VmRSS:")
    train, held_out = split_held_out(load_prompts(DataSettings(source=path, system_prompt=None)).prompts, 64, 0)
    print(len(train), len({train[i].id for i in range(0, len(train), 100)}), megabytes("VmHWM:") - before)
    del train, held_out
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process where Linux has it")
def test_memory_does_not_grow_with_the_text(tmp_path):
    # 40,000 problems of 2,500 characters: 100 MB of text.
    count = 40_000
    texts = [f"problem {i}: " + f"{i % 10}" * 2490 for i in range(count)]
    paths = [tmp_path / name for name in ("rows.jsonl", "rows.csv", "rows.parquet", "one-group.parquet")]
    paths[0].write_text("".join(json.dumps({"problem": text, "answer": "1"}) + "\n" for text in texts))
    paths[1].write_text("problem,answer\n" + "".join(f"{text},1\n" for text in texts))
    rows = pa.table({"problem": texts, "answer": ["1"] * count})
    pq.write_table(rows, paths[2], row_group_size=2000, compression="none", use_dictionary=False)
    pq.write_table(rows, paths[3], row_group_size=count, compression="none", use_dictionary=False)
    command = [sys.executable, "-c", GROWTH, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [(int(kept), int(read)) for kept, read, _ in lines] == [(count - 64, 400)] * 4, done.stderr
    assert all(float(megabytes) < 70 for _, _, megabytes in lines), lines


def test_a_store_gives_back_what_it_was_given_from_memory_and_from_disk(monkeypatch):
    monkeypatch.setattr(store, "IN_MEMORY", 300)
    kept = PromptStore()
    for i in range(50):
        kept.add(prompt(i))
    assert kept._file._rolled  # on disk by now
    assert (
        kept == tuple(prompt(i) for i in range(50)) and kept[-1] == prompt(49) and kept[3:5] == (prompt(3), prompt(4))
    )
    with pytest.raises(IndexError):
        kept[50]
    kept.add(prompt(50))
    assert kept[50] == prompt(50) and kept[0] == prompt(0)


def test_a_digest_tells_any_change(tmp_path):
    first = split_held_out([prompt(i) for i in range(20)], 5, seed=1)[0]
    assert digest_of(first) == digest_of(split_held_out([prompt(i) for i in range(20)], 5, seed=1)[0])
    others = [split_held_out([prompt(i) for i in range(20)], 5, seed=2)[0]]
    others.append(split_held_out([prompt(i + (i == 7)) for i in range(20)], 5, seed=1)[0])
    assert digest_of(first) not in [digest_of(other) for other in others]
    digests = set()
    for numbers in ([1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2]):
        kept = PromptStore()
        for i in numbers:
            kept.add(prompt(i))
        digests |= {digest_of(kept), digest_of(split_held_out(kept, 1, seed=0)[0])}
    assert len(digests) == 8


# -------------------------------------------------------------------------------------------- tokenised when taken


def test_only_what_is_taken_is_tokenised():
    asked: list[str] = []

    def encode(p: Prompt) -> list[int]:
        asked.append(p.id)
        return [1] * 3

    stream = PromptStream(LazyPrompts([prompt(i) for i in range(1000)], encode, 5), seed=0)
    assert [p.index for p in stream.take(40, 4)] == [40, 41, 42, 43]
    assert len(asked) == 5  # and the first one, for the digest


@settings(max_examples=100, deadline=None)
@given(
    usable=st.lists(st.booleans(), min_size=1, max_size=12).filter(any),
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 5),
)
def test_a_stream_with_gaps_goes_on_from_where_it_stood(usable, counts, seed):
    prompts = [EncodedPrompt(i, prompt(i), (i,)) if ok else None for i, ok in enumerate(usable)]
    whole = PromptStream(prompts, seed).take(0, sum(counts))
    cursor, parts = 0, []
    for count in counts:
        taken = PromptStream(prompts, seed).take(cursor, count)  # a fresh one each time, as after a kill
        assert len(taken) == count
        cursor = taken[-1].index + 1
        parts += taken
    assert parts == whole
    # Every epoch has every usable prompt once.
    epoch = [p for p in whole if p.index < len(usable)]
    assert len({p.ids for p in epoch}) == len(epoch) <= sum(usable)


def test_a_stream_of_nothing_but_too_long_prompts_ends():
    with pytest.raises(UserError, match=r"too long: raise data\.max_prompt_tokens"):
        PromptStream(LazyPrompts([prompt(i) for i in range(5)], lambda p: [0] * 9, 8), seed=0).take(3, 1)


def test_one_usable_prompt_among_too_long_ones_is_found_every_epoch():
    prompts = LazyPrompts([prompt(i) for i in range(50)], lambda p: [0] * (1 if p.id == "31" else 9), 8)
    taken = PromptStream(prompts, seed=0).take(0, 4)
    assert [p.prompt.id for p in taken] == ["31"] * 4
    assert [p.index // 50 for p in taken] == [0, 1, 2, 3]


def test_an_iteration_passes_over_what_is_too_long_and_the_next_goes_on_behind_it(make_recipe, make_loop):
    loop = make_loop(make_recipe())
    loop.stream = PromptStream([p if i % 3 else None for i, p in enumerate(loop.stream.prompts)], seed=0)
    positions, state = [], TrainState()
    collect = loop.sample

    def watched(state):
        collected = collect(state)
        positions.extend(dict.fromkeys(c.prompt.index for c in collected.completions))
        return collected

    loop.sample = watched
    passed_over = 0
    for _ in range(3):
        state, metrics, _ = loop.step(state)
        passed_over += metrics["groups/too_long"]
    assert positions == [p.index for p in loop.stream.take(0, 12)]
    assert state.cursor == positions[-1] + 1 and passed_over == state.cursor - 12 > 0
