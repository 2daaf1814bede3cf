"""python -m hapo_lite.probe: its numbers, that being stopped changes no byte, and that training takes its file."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

import hapo_lite
from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.evaluate.samples import SampleFile
from hapo_lite.probe import __main__ as probe
from hapo_lite.probe.histogram import histogram, lines_of
from hapo_lite.runs.summary import ProbeSummary
from hapo_lite.train import __main__ as train
from tests.conftest import TINY

SETTINGS = [
    "-k",
    "4",
    "data.limit=20",
    "rollout.batch_size=16",
    "rollout.max_new_tokens=24",
    "reward.workers=1",
    "logging.progress=false",
]


def run(*arguments) -> int:
    return run_command(probe.main, [str(TINY), *map(str, arguments)])


def remains(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "tiny_cpu" / "probe").glob("*.jsonl")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """output_dir of a whole probe."""
    folder = tmp_path_factory.mktemp("finished")
    assert run(f"output_dir={folder}", *SETTINGS) == 0
    return folder


def test_the_rates_are_those_of_the_samples(finished):
    found = remains(finished)
    [samples] = [content.splitlines() for name, content in found.items() if name.startswith("samples-")]
    header, *lines = map(json.loads, found["pass_rates.jsonl"].splitlines())
    assert json.loads(samples[0]) == header and header["protocol"]["samples"] == 4
    right, length, cut = Counter(), Counter(), Counter()
    for sample in map(json.loads, samples[1:]):
        right[sample["prompt"]] += sample["outcome"] == "correct"
        length[sample["prompt"]] += sample["length"]
        cut[sample["prompt"]] += sample["truncated"]
    assert len(lines) == 20 and 0 < sum(right.values()) < 80
    for line in lines:
        name = line["prompt"]
        assert (line["right"], line["attempts"], line["truncated"]) == (right[name], 4, cut[name])
        assert line["mean_length"] == length[name] / 4


def test_asked_to_stop_it_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch, capsys):
    append, parts = SampleFile.append, []

    def and_then_a_signal(self, samples, write=True):
        append(self, samples, write)
        parts.append(len(samples))
        if len(parts) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(SampleFile, "append", and_then_a_signal)
    assert run(f"output_dir={tmp_path}", *SETTINGS) == 128 + signal.SIGINT
    assert "the same command continues from here" in capsys.readouterr().err
    assert len(remains(tmp_path)) == 1
    # Half a probe of another setup is not mixed with this one.
    assert run(f"output_dir={tmp_path}", *SETTINGS, "rollout.temperature=0.5") == 2
    assert "holds a probe with temperature = 1.0, and this one has temperature = 0.5" in capsys.readouterr().err
    assert run(f"output_dir={tmp_path}", *SETTINGS) == 0
    assert "32 completions from before" in capsys.readouterr().out
    assert len(parts) == 5 and remains(tmp_path) == remains(finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["-k", "2"],
            "with samples = 4, and this one has samples = 2: give what that one had to go on, choose another",
        ),
        (["data.limit=19"], "with data.limit = 20, and this one has data.limit = 19"),
        (["data.system_prompt=Be brief."], "with data.system_prompt = None, and this one has data.system_prompt = Be"),
        (["seed=4"], "with seed = 0, and this one has seed = 4"),
        (["-k", "0"], "k = 0: a probe takes at least one completion of each prompt"),
        (["rollout.max_new_tokens=255"], "leave 1 of the model's context of 256: set rollout.max_new_tokens lower"),
    ],
)
def test_another_setup_gets_a_sentence_and_changes_nothing(finished, capsys, change, message):
    before = remains(finished)
    assert run(f"output_dir={finished}", *SETTINGS, *change) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert remains(finished) == before


def test_training_takes_the_prompts_between_the_bounds(finished, tmp_path, capsys):
    """The probe lies in the folder of the run that reads it, as it does for a user."""
    path = finished / "tiny_cpu" / "probe" / "pass_rates.jsonl"
    rates = {line["prompt"]: line for line in map(json.loads, path.read_text().splitlines()[1:])}
    inside = {name for name, line in rates.items() if 0.25 <= line["right"] / 4 <= 0.5}
    assert 0 < len(inside) < len(rates)
    settings = [
        f"output_dir={finished}",
        f"data.pass_rate.file={path}",
        "data.pass_rate.between=[0.25, 0.5]",
        *SETTINGS[2:],
        "training.iterations=1",
        "evaluation.prompts=0",
        "rollout.prompts_per_iteration=20",
        "rollout.completions_per_prompt=2",
        "logging.traces_per_iteration=40",
    ]
    assert run_command(train.main, [str(TINY), *settings]) == 0
    assert f"{len(inside)} of 20 prompts have a pass rate between 0.25 and 0.5" in capsys.readouterr().out
    traces = (finished / "tiny_cpu" / "traces" / "000001.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt_id"] for line in traces} == inside
    elsewhere = [f"output_dir={tmp_path}", *settings[1:], "data.limit=25"]
    assert run_command(train.main, [str(TINY), *elsewhere]) == 2
    assert "5 of 25 training prompts are not in" in capsys.readouterr().err


def test_the_histogram_by_hand():
    shares = [0, 0, 0.05, 0.1, 0.125, 3 / 10, 0.5, 0.8, 0.9, 0.95, 1, 1, 1]
    counts = histogram(shares)
    assert [count for count in counts.values() if count] == [2, 1, 2, 1, 1, 2, 1, 3]
    assert {name: counts[name] for name in ("0", "(0, 0.1)", "[0.1, 0.2)", "[0.3, 0.4)", "[0.8, 0.9]", "1")} == {
        "0": 2,
        "(0, 0.1)": 1,
        "[0.1, 0.2)": 2,
        "[0.3, 0.4)": 1,
        "[0.8, 0.9]": 2,
        "1": 3,
    }
    assert sum(counts.values()) == len(shares)
    lines = lines_of({"0": 1, "1": 3})
    assert lines == [f"         0  1   25.0 %  {'#' * 13}", f"         1  3   75.0 %  {'#' * 40}"]


def test_from_python_with_an_adapter(make_recipe):
    recipe = make_recipe("training.iterations=1", "data.limit=8", "rollout.max_new_tokens=24")
    hapo_lite.train(recipe)
    alone = hapo_lite.probe(recipe, k=2)
    assert alone.keys() == ProbeSummary.__annotations__.keys()
    assert (alone["prompts"], alone["samples"], sum(alone["histogram"].values())) == (8, 2, 8)
    header = json.loads(Path(alone["file"]).read_text().splitlines()[0])["protocol"]
    assert header["adapter_sha256"] is None
    with pytest.raises(UserError, match="holds a probe with no adapter, and this one has an adapter with the SHA-256 "):
        hapo_lite.probe(recipe, k=2, adapter=recipe.run_dir)
