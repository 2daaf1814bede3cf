"""Several rewards by name: what functions are handed, what they do amiss, and a run with them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path

import pytest
import torch

from hapo_lite.cli import run_command
from hapo_lite.errors import UserError
from hapo_lite.recipe import OWN_REWARDS, DataSettings, RewardSettings, load_recipe
from hapo_lite.records import Prompt, Score
from hapo_lite.runs.checkpoint import TrainState
from hapo_lite.runs.lines import MetricsFile, timeless
from hapo_lite.runs.skipped import SkippedStep, load_step, save_step
from hapo_lite.runs.trace import read_traces
from hapo_lite.tasks.data import Column, load_prompts
from hapo_lite.tasks.functions import OURS
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.tasks.store import digest_of
from hapo_lite.train import run
from hapo_lite.train.__main__ import main
from hapo_lite.train.scoring import advantages
from tests.conftest import ROOT
from tests.loops import run_steps

PROMPTS = [
    Prompt("p", (("system", "Be brief."), ("user", "1+1=?")), "2", columns={"hard": 0.5, "tags": ["sum"]}),
    Prompt("q", (("user", "2+1=?"),), "3", columns={"hard": None, "tags": []}),
]
TEXTS = [r"\boxed{2}", "three?"]


def write(folder: Path, code: str) -> Path:
    path = folder / "judges.py"
    path.write_text(code)
    return path


def score(settings: RewardSettings, iteration: int | None = 7) -> list[Score]:
    with Scorer(settings, max_new_tokens=100) as scorer:
        return scorer.score(PROMPTS, TEXTS, [10, 95], [False, True], iteration)


def of(folder: Path, code: str, *more: str, **options) -> RewardSettings:
    return RewardSettings(functions=[{"function": f"{write(folder, code)}:judge", **options}, *more])


def test_ours_by_hand():
    settings = RewardSettings(functions=list(OWN_REWARDS), overlong_buffer=10, overlong_penalty=0.5, wrong=-1)
    right, wrong = score(settings)
    # Of 100 tokens at most, 10 and 95 were written; the ramp of 10 is half gone at 95, times a penalty of 0.5.
    assert right.rewards == {"correct": 1.0, "boxed": 1.0, "length": -0.1, "overlong": 0.0}
    assert wrong.rewards == {"correct": -1.0, "boxed": 0.0, "length": -0.95, "overlong": -0.25}
    assert [right.reward, wrong.reward] == pytest.approx([1.9, -2.2])
    assert set(OURS) == set(OWN_REWARDS)


def test_weights_multiply_and_grades_stay():
    settings = RewardSettings(
        functions=["correct", {"function": "length", "weight": 2}, {"function": "boxed", "weight": 0}]
    )
    right, wrong = score(settings)
    assert [right.reward, wrong.reward] == pytest.approx([1 - 0.2, -1.9])
    assert (right.rewards["boxed"], right.correct, right.outcome, right.answer) == (1.0, True, "correct", "2")
    assert (wrong.correct, wrong.outcome) == (False, "unparseable")


def test_a_function_is_handed_what_its_signature_asks_for(tmp_path):
    code = (
        "import json, pathlib\n"
        "def judge(completions, *, hard, iteration, tags=None, missing='own', **others):\n"
        "    seen = [completions, hard, iteration, tags, missing, others]\n"
        "    pathlib.Path(__file__ + '.json').write_text(json.dumps(seen))\n"
        "    return [0.0] * len(completions)\n"
    )
    score(of(tmp_path, code))
    *named, others = json.loads((tmp_path / "judges.py.json").read_text())
    assert named == [TEXTS, [0.5, None], 7, [["sum"], []], "own"]
    expected = {"prompts": ["1+1=?", "2+1=?"], "answers": ["2", "3"]}
    assert others == expected | {"token_counts": [10, 95], "truncated": [False, True]}


def test_async_functions_are_awaited_together_and_keep_their_loop(tmp_path):
    code = (
        "import asyncio\n"
        "both, loops = None, set()\n"
        "async def meet(completions):\n"
        "    global both\n"
        "    loops.add(asyncio.get_running_loop())\n"
        "    both = both or asyncio.Barrier(2)\n"
        "    await both.wait()\n"
        "    return [len(loops)] * len(completions)\n"
        "async def judge(completions):\n"
        "    return await meet(completions)\n"
    )
    path = write(tmp_path, code)
    settings = RewardSettings(functions=[{"function": f"{path}:{name}", "timeout_s": 20} for name in ("meet", "judge")])
    with Scorer(settings, 100) as scorer:
        for iteration in (1, 2):
            scores = scorer.score(PROMPTS, TEXTS, [10, 95], [False, True], iteration)
            # A barrier of two opens for neither alone; both share one loop, and one import of the file.
            assert scores[0].rewards == {"meet": 1.0, "judge": 1.0}


@pytest.mark.parametrize("form", ["def", "async def"])
@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return [1.0]", r"returned 1 reward for 2 completions"),
        ("return [1.0, 'x']", r"returned 'x' for completion 1"),
        ("return None", r"returned NoneType"),
        ("return [1 / 0]", r"raised ZeroDivisionError: division by zero at .*judges\.py:3"),
        ("raise SystemExit(3)", r"raised SystemExit: 3 at .*judges\.py:3"),
        ("import asyncio; raise asyncio.CancelledError('theirs')", r"raised CancelledError: theirs at .*judges\.py:3"),
        ("raise TimeoutError('theirs')", r"raised TimeoutError: theirs at .*judges\.py:3"),
        ("import torch; return torch.tensor(1.0)", r"raised TypeError"),
    ],
)
def test_what_a_function_does_amiss_names_it(tmp_path, form, body, complaint):
    code = f"import time\n{form} judge(completions):\n    {body}\n"
    with pytest.raises(UserError, match=rf"^the reward strict \(.*judges\.py:judge\) {complaint}") as caught:
        score(of(tmp_path, code, name="strict"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "import time\ndef judge(completions):\n    time.sleep(30)\n",
        "import asyncio\nasync def judge(completions):\n    await asyncio.sleep(30)\n",
        "import time\nasync def judge(completions):\n    time.sleep(30)\n",
        "import time\ndef judge(completions):\n    yield 1.0\n    time.sleep(30)\n",
    ],
    ids=["sync", "async", "async that blocks", "generator"],
)
def test_a_function_that_hangs_is_given_up(tmp_path, code):
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the reward judge .* did not return within 0\.2 seconds: .* its timeout_s"):
        score(of(tmp_path, code, timeout_s=0.2))
    assert time.monotonic() - started < 10


def test_functions_that_cannot_be_called(tmp_path):
    for code, complaint in [
        ("def judge(completions, /):\n    ...\n", "takes completions by its place alone"),
        ("judge = dict.fromkeys\njudge = type('J', (), {'__call__': 5})()\n", "does not say which arguments it takes"),
        ("def other():\n    ...\n", "reward.functions .*has no function 'judge'; it has other"),
    ]:
        with pytest.raises(UserError, match=complaint):
            Scorer(of(tmp_path, code), 100)


@pytest.mark.parametrize(
    ("functions", "complaint"),
    [
        ("[corect]", "'corect' is neither one of correct, boxed, .*did you mean correct"),
        ("[correct, correct]", "two rewards are named correct"),
        ("[{function: correct, name: mean}]", "reward/mean is a metric of the whole reward"),
        ("[{function: correct, name: a b}]", "letters, digits"),
        ("[{function: correct, weight: .inf}]", "weight"),
        ("[{function: correct, timeout_s: 0}]", "timeout_s"),
        ("[{name: correct}]", "function is missing"),
        ("[{function: correct, wieght: 1}]", "wieght is not a field"),
    ],
)
def test_mistakes_in_the_list(functions, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", [f"reward.functions={functions}"])
    assert "\n" not in str(caught.value)


def test_one_function_is_a_list_of_one_and_a_recipe_reads_back():
    recipe = load_recipe(ROOT / "recipes" / "tiny_cpu.yaml", ["reward.functions=a/judges.py:brief"])
    [reward] = recipe.reward.functions
    assert (reward.name, reward.function, reward.weight) == ("brief", "a/judges.py:brief", 1.0)


def test_a_column_that_the_data_lacks_ends_the_run_with_the_columns(make_recipe, tmp_path):
    path = write(tmp_path, "def judge(completions, anser):\n    return [0.0] * len(completions)\n")
    with pytest.raises(UserError) as caught:
        run.train(make_recipe(f"reward.functions=[{path}:judge]"))
    assert str(caught.value).startswith(
        f"the reward judge ({path}:judge) asks for 'anser', and the built-in task has no"
    )
    assert "it has problem, answer, solution, and every function can have prompts, completions" in str(caught.value)
    assert str(caught.value).endswith("did you mean answer?")


def test_an_evaluation_asks_no_function(tmp_path):
    code = "def judge(completions):\n    raise RuntimeError('asked')\n"
    settings = of(tmp_path, code, "correct")
    assert score(settings, iteration=None) == [Score(1.0, True, "correct", "2"), Score(0.0, False, "unparseable", None)]
    with pytest.raises(UserError, match="asked"):
        score(settings)


def test_a_reward_that_is_nan_skips_the_iteration_by_its_name(make_recipe, make_loop, tmp_path):
    code = "def judge(completions):\n    return [float('nan')] + [0.0] * (len(completions) - 1)\n"
    functions = f"[correct, {{function: {write(tmp_path, code)}:judge, weight: 0}}]"
    loop = make_loop(make_recipe(f"reward.functions={functions}"))
    kept = []
    loop.observer.on_skip = kept.append
    state, lines = run_steps(loop, 1)
    assert state.updates == 0 and re.search(r"the reward judge of completion 0 of prompt .* is nan", kept[0].reason)
    assert all(line == line for line in lines[0].values())


def test_groups_are_equal_where_each_normalised_reward_is(make_recipe, make_loop, tmp_path):
    """Two rewards whose sum is 0 for every completion, on a group of four."""
    code = (
        "def up(completions):\n    return [float(i % 2) for i in range(len(completions))]\n"
        "def down(completions):\n    return [-float(i % 2) for i in range(len(completions))]\n"
    )
    path = write(tmp_path, code)
    functions = f"[{path}:up, {{function: {path}:down, weight: 1}}]"
    for combine, equal in (("sum", 1.0), ("normalise_each", 0.0)):
        loop = make_loop(make_recipe(f"reward.functions={functions}", f"reward.combine={combine}"))
        collected = loop.sample(TrainState(iteration=1))
        assert collected.groups_equal / collected.groups_sampled == equal
        assert {s.reward for s in collected.scores} == {0.0}


def test_a_loud_reward_does_not_drown_the_rest(make_recipe, make_loop, tmp_path):
    """Scaling one reward by 1,000 changes the advantages of a sum, and leaves those of normalise_each."""
    code = "def loud(token_counts):\n    return [1000.0 * n for n in token_counts]\n"
    code += "def quiet(token_counts):\n    return [float(n) for n in token_counts]\n"
    path, found = write(tmp_path, code), {}
    for combine in ("sum", "normalise_each"):
        for name in ("loud", "quiet"):
            functions = f"[correct, {path}:{name}]"
            loop = make_loop(make_recipe(f"reward.functions={functions}", f"reward.combine={combine}", "method=dapo"))
            graded = loop.sample(TrainState(iteration=1)).graded
            found[combine, name] = advantages(graded, loop.recipe.method, loop.recipe.reward.normalised)
    assert torch.allclose(found["normalise_each", "loud"], found["normalise_each", "quiet"], atol=1e-4)
    assert not torch.allclose(found["sum", "loud"], found["sum", "quiet"], atol=0.05)


def sections_of_the_guide() -> dict[str, str]:
    """The example of docs/rewards.md: its recipe, its file and its row."""
    text = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8").partition("## Several rewards")[2]
    return {kind: re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL)[1] for kind in ("yaml", "python", "json")}


@pytest.fixture
def example(tmp_path, monkeypatch) -> Path:
    """The guide's example in a folder of its own, with 24 rows like the guide's."""
    found = sections_of_the_guide()
    (tmp_path / "judged.yaml").write_text(found["yaml"])
    (tmp_path / "judges.py").write_text(found["python"])
    row = json.loads(found["json"])
    rows = [row | {"problem": f"{i}*7+{i}=?", "answer": str(8 * i), "most_tokens": 12 + i} for i in range(2, 26)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_of_the_guide_trains(example, capsys):
    assert run_command(main, ["judged.yaml", "training.iterations=1"]) == 0
    assert "note: the reward within_budget is code, which runs with your rights" in capsys.readouterr().out
    line = MetricsFile(example / "runs" / "judged" / "metrics.jsonl").read()[1]
    weights = {"correct": 1.0, "boxed": 0.2, "within_budget": 0.5, "style": 0.1}
    total = sum(weight * line[f"reward/{name}"] for name, weight in weights.items())
    assert line["reward/mean"] == pytest.approx(total) and line["update/skipped"] == 0
    assert line["reward/correct"] == line["reward/correct_share"]
    traces = read_traces(example / "runs" / "judged" / "traces" / "000001.jsonl")
    assert {trace.stage for trace in traces} == {"train", "eval"}
    for trace in traces:
        most = 12 + int(trace.messages[-1][1].split("*")[0])
        if trace.stage == "train":
            assert tuple(trace.rewards) == tuple(weights)
            assert trace.rewards["within_budget"] == float(len(trace.tokens["id"]) <= most)
        else:
            assert trace.rewards == {}


@pytest.mark.slow
def test_a_run_with_several_rewards_resumes_to_the_same_bytes(example):
    assert run_command(main, ["judged.yaml", "training.iterations=1"]) == 0
    assert run_command(main, ["judged.yaml"]) == 0
    assert run_command(main, ["judged.yaml", "output_dir=whole"]) == 0
    runs = [example / name / "judged" for name in ("runs", "whole")]
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in runs]
    assert adapters[0] == adapters[1]
    lines = [timeless(MetricsFile(folder / "metrics.jsonl").read()[2]) for folder in runs]
    assert lines[0] == lines[1] and lines[0]["reward/style"] <= 0.0
    traces = [(folder / "traces" / "000002.jsonl").read_bytes() for folder in runs]
    assert traces[0] == traces[1]


def test_columns_that_are_asked_for_are_kept_and_no_others(tmp_path):
    rows = [{"problem": f"{i}?", "answer": "1", "hard": i / 7, "day": None, "note": "x" * 999} for i in range(3)]
    columns = [Column("hard", "a reward", required=True), Column("soft", "a reward", required=False)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = DataSettings(source=str(path))
    kept, plain = load_prompts(data, columns).prompts, load_prompts(data).prompts
    assert [prompt.columns for prompt in kept] == [{"hard": i / 7} for i in range(3)]
    assert [prompt.columns for prompt in plain] == [{}] * 3
    # A run without such rewards has the digest that it had before there were columns: that of three fields.
    fields = [json.dumps([p.id, p.messages, p.answer], ensure_ascii=False).encode() for p in plain]
    assert digest_of(plain) == hashlib.sha256(b"".join(fields)).hexdigest() != digest_of(kept)


def test_a_skipped_step_keeps_rewards_and_columns(make_recipe, make_loop, tmp_path):
    code = "def judge(completions, problem):\n    return [float(len(p)) for p in problem]\n"
    loop = make_loop(make_recipe(f"reward.functions=[correct, {write(tmp_path, code)}:judge]"))
    graded = loop.sample(TrainState(iteration=1)).graded
    step = SkippedStep(1, 0, "for a test", graded, [list(range(len(graded)))])
    found = load_step(save_step(tmp_path, step, loop.policy.trainable(), loop.recipe))
    assert found.step.graded.scores == graded.scores and found.recipe == loop.recipe
    prompts = [completion.prompt.prompt for completion in graded.completions]
    assert [completion.prompt.prompt for completion in found.step.graded.completions] == prompts
    assert all(p.columns["problem"] == p.messages[-1][1] for p in prompts)
    assert {s.rewards["judge"] for s in graded.scores} == {float(len(p.columns["problem"])) for p in prompts}
