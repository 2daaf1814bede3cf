"""Which prompts an iteration takes: the orders, the weights, the prompts that rest, and a state that resumes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_lite.errors import UserError
from hapo_lite.recipe import PassRateSettings, TrainingDataSettings
from hapo_lite.records import GroupResult, Prompt, Standing
from hapo_lite.runs.checkpoint import TrainState, list_checkpoints, read_record
from hapo_lite.tasks.curriculum import make_stream, weights
from hapo_lite.tasks.data import load_prompts
from hapo_lite.tasks.pass_rates import PassRate, choose_by_pass_rate, problem_hash, read_pass_rates, write_pass_rates
from hapo_lite.tasks.stream import LazyPrompts, PromptStream
from hapo_lite.train import run
from hapo_lite.verify_resume.verify import left_by
from tests.loops import train_into_the_third


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(f"p{i}", (("user", f"{i}?"),), str(i)) for i in range(count)]


def lazy(count: int, too_long: tuple[int, ...] = ()) -> LazyPrompts:
    return LazyPrompts(prompts_of(count), lambda p: [0] * (9 if int(p.id[1:]) in too_long else 1), most=5)


def data(**changes) -> TrainingDataSettings:
    return TrainingDataSettings(source="tiny", **changes)


def rates_of(*right: int, attempts: int = 8) -> dict[str, PassRate]:
    found = zip(prompts_of(len(right)), right, strict=True)
    return {p.id: PassRate(p.id, problem_hash(p), n, attempts, 3.0, 0) for p, n in found}


def names(taken) -> list[str]:
    return [prompt.prompt.id for prompt in taken]


# ---------------------------------------------------------------------------------------------------- the orders


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 9), start=st.integers(0, 40), count=st.integers(1, 20))
def test_without_a_curriculum_the_order_is_the_one_that_it_was(size, seed, start, count):
    """Also with prompts that may rest, as long as none does."""
    naive = [int(np.random.default_rng((seed, p // size)).permutation(size)[p % size]) for p in range(start, 60)]
    for changes in ({}, {"rest": {"solved": 2}}):
        stream = make_stream(lazy(size), data(**changes), {}, seed)
        taken = stream.draw(start, 1, {}).take(count)
        assert [p.index for p in taken] == list(range(start, start + count))
        assert names(taken) == [f"p{i}" for i in naive[:count]]
        assert stream.digest == PromptStream(lazy(size), seed).digest


def test_easy_first_goes_from_high_to_low_and_shuffles_equals():
    chosen = data(pass_rate={"file": "x"}, curriculum="easy_first")
    epochs = []
    for epoch in range(6):
        stream = make_stream(lazy(6), chosen, rates_of(1, 8, 4, 4, 0, 4), seed=5)
        epochs.append(names(stream.draw(6 * epoch, 1, {}).take(6)))
    for epoch in epochs:
        assert epoch[0] == "p1" and epoch[4:] == ["p0", "p4"] and sorted(epoch[1:4]) == ["p2", "p3", "p5"]
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_other_pass_rates_are_another_run_where_they_decide_the_order():
    for curriculum in ("easy_first", "match"):
        chosen = data(pass_rate={"file": "x"}, curriculum=curriculum)
        one, two = (make_stream(lazy(3), chosen, rates_of(1, n, 4), 0).digest for n in (2, 3))
        assert one != two


def test_weights_by_hand():
    # a b / ((a + b)(a + b + 1)): 0.5 * 8.5 / (9 * 10); 4.5 * 4.5 / (9 * 10); without any attempt 0.25 / (1 * 2).
    found = weights([Standing(0, 8), Standing(4, 8), Standing(8, 8), Standing()])
    assert found.tolist() == pytest.approx([4.25 / 90, 20.25 / 90, 4.25 / 90, 0.125])


def test_match_draws_by_weight_and_nothing_twice_before_all():
    stream = make_stream(lazy(3), data(curriculum="match"), rates_of(4, 0, 8), seed=0)
    first = []
    for iteration in range(1, 4001):
        taken = names(stream.draw(7, iteration, {}).take(3))
        assert sorted(taken) == ["p0", "p1", "p2"]
        first.append(taken[0])
    w = weights([Standing(4, 8), Standing(0, 8), Standing(8, 8)])
    assert first.count("p0") / 4000 == pytest.approx(w[0] / w.sum(), abs=0.025)
    assert first.count("p1") / 4000 == pytest.approx(w[1] / w.sum(), abs=0.025)
    # The run's own results take the place of the probe's.
    now = {"p0": Standing(16, 16), "p2": Standing(4, 8)}
    first = [names(stream.draw(0, iteration, now).take(1))[0] for iteration in range(1, 2001)]
    w = weights([Standing(16, 16), Standing(0, 8), Standing(4, 8)])
    assert first.count("p2") / 2000 == pytest.approx(w[2] / w.sum(), abs=0.035)


def test_a_draw_goes_on_where_it_stopped():
    for chosen in (data(curriculum="match"), data(rest={"solved": 1})):
        stream = make_stream(lazy(9), chosen, {}, seed=1)
        state = {"p3": Standing(8, 8, 1, rests_until=4), "p5": Standing(8, 8, 1, rests_until=4)}
        whole, parts = stream.draw(20, 3, state), stream.draw(20, 3, state)
        together = whole.take(6)
        assert parts.take(2) + parts.take(4) == together and parts.used == whole.used
        assert not {"p3", "p5"} & set(names(together))


# --------------------------------------------------------------------------------------------------- what rests


def test_a_standing_by_hand():
    stream = make_stream(lazy(2), data(rest={"solved": 2, "iterations": 3}), rates_of(6, 1), seed=0)
    one = stream.after({}, [GroupResult("p0", 4, 4)], 1)
    # 0.5 * 6 + 4 of 0.5 * 8 + 4.
    assert one == {"p0": Standing(7.0, 8.0, 1, 0)}
    two = stream.after(one, [GroupResult("p0", 4, 4), GroupResult("p1", 0, 4)], 2)
    assert two == {"p0": Standing(7.5, 8.0, 2, 5), "p1": Standing(0.5, 8.0, 0, 0)}
    assert one == {"p0": Standing(7.0, 8.0, 1, 0)}  # the state of the iteration before stays
    # It rests in iterations 3 to 5; solved again after that, it rests again at once; a wrong answer begins anew.
    for iteration, rests in ((3, True), (5, True), (6, False)):
        assert ("p0" in names(stream.draw(0, iteration, two).take(1))) is not rests
    assert stream.after(two, [GroupResult("p0", 4, 4)], 6)["p0"][2:] == (3, 9)
    assert stream.after(two, [GroupResult("p0", 3, 4)], 6)["p0"][2:] == (0, 5)


def test_nothing_is_remembered_where_nothing_asks_for_it():
    for chosen in (data(), data(pass_rate={"file": "x"}, curriculum="easy_first")):
        assert make_stream(lazy(1), chosen, rates_of(1), 0).after({}, [GroupResult("p0", 1, 1)], 1) == {}


@settings(max_examples=80, deadline=None)
@given(
    resting=st.sets(st.integers(0, 7)),
    too_long=st.sets(st.integers(0, 7), max_size=7),
    start=st.integers(0, 30),
    count=st.integers(1, 8),
    match=st.booleans(),
)
def test_resting_prompts_are_taken_before_any_prompt_is_taken_twice(resting, too_long, start, count, match):
    start -= start % 8  # the next eight positions are then one epoch
    chosen = data(rest={"solved": 1}, curriculum="match" if match else "none")
    stream = make_stream(lazy(8, tuple(too_long)), chosen, {}, seed=2)
    draw = stream.draw(start, 5, {f"p{i}": Standing(8, 8, 1, rests_until=5) for i in resting - too_long})
    taken = draw.take(min(count, 8 - len(too_long)))
    found = {int(name[1:]) for name in names(taken)}
    awake = set(range(8)) - resting - too_long
    assert len(found) == len(taken) and not found & too_long
    assert found <= awake or found >= awake
    assert [p.index for p in taken] == sorted(p.index for p in taken)
    assert max(p.index for p in taken) < start + draw.used
    assert draw.too_long <= len(too_long)


def test_a_state_with_standings_survives_a_file_and_one_without_is_that_of_old():
    state = TrainState(iteration=3, standings={"p": Standing(0.1 + 0.2, 3.0, 2, 9)})
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state
    assert "standings" not in TrainState(iteration=3).to_json()
    assert TrainState.from_json(TrainState(iteration=3).to_json()).standings == {}


# ------------------------------------------------------------------------------------------------ the pass rates


def test_both_bounds_are_included(tmp_path):
    path = tmp_path / "rates.jsonl"
    rates = list(rates_of(0, 1, 5, 9, 10, attempts=10).values())
    write_pass_rates(path, {"samples": 10}, rates)
    assert list(read_pass_rates(path).values()) == rates
    raw = path.read_text().replace('"p4"', '"p\u2028\x854"')  # as a program writes it that does not escape
    path.write_text(raw, encoding="utf-8")
    assert "p\u2028\x854" in read_pass_rates(path)
    path.write_text(raw.replace("\u2028\x85", ""))
    said: list[str] = []
    chosen = choose_by_pass_rate(prompts_of(5), PassRateSettings(file=str(path)), said.append)
    assert [p.id for p in chosen.prompts] == ["p1", "p2", "p3"]
    assert said == ["data: 3 of 5 prompts have a pass rate between 0.1 and 0.9 (1 below, 1 above)"]
    everything = PassRateSettings(file=str(path), between=(0, 1))
    assert len(choose_by_pass_rate(prompts_of(5), everything, said.append).prompts) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"there is no file .*: python -m hapo_lite\.probe RECIPE writes it"),
        (lambda path: path.write_text(""), "is not a file of pass rates"),
        (
            lambda path: path.write_text('{"iteration": 1}\n'),
            r"\(its first line has no protocol\): give the pass_rates",
        ),
        (lambda path: path.write_text(path.read_text()[:-9]), "is not a file of pass rates"),
        (
            lambda path: path.write_text(path.read_text().replace("p2", "q2")),
            r"1 of 5 training prompts is not in .* with the same text and answer \(p2\): .* measures them",
        ),
        (
            lambda path: write_pass_rates(path, {}, [PassRate(f"p{i}", "other", 4, 8, 3.0, 0) for i in range(5)]),
            r"5 of 5 training prompts are not in .* \(p0, p1, p2, \.\.\.\): it is of other data",
        ),
        (
            lambda path: write_pass_rates(path, {}, list(rates_of(0, 8, 0, 0, 0).values())),
            r"no training prompt has a pass rate between 0\.1 and 0\.9 .* \(4 below, 1 above\): widen",
        ),
        (
            lambda path: write_pass_rates(path, {}, list(rates_of(0, 0, 0, 0, 0, attempts=0).values())),
            r"\(0 below, 0 above, 5 too long for the probe\)",
        ),
    ],
)
def test_a_file_that_does_not_serve_gets_a_sentence(tmp_path, change, message):
    path = tmp_path / "rates.jsonl"
    write_pass_rates(path, {}, list(rates_of(1, 2, 3, 4, 5).values()))
    change(path)
    with pytest.raises(UserError, match=message) as error:
        choose_by_pass_rate(prompts_of(5), PassRateSettings(file=str(path)), lambda text: None)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "settings",
    [
        ["data.curriculum=easy_first", "data.pass_rate.file={rates}"],
        ["data.curriculum=match", "data.rest.solved=1", "data.pass_rate.file={rates}", "data.pass_rate.between=[0,1]"],
        ["data.rest.solved=1", "data.rest.iterations=2"],
    ],
    ids=["easy_first", "match", "rest"],
)
def test_a_run_resumes_to_the_same_bytes(make_recipe, tmp_path, monkeypatch, settings):
    found = load_prompts(make_recipe("data.limit=24").data).prompts
    rates = [PassRate(p.id, problem_hash(p), i % 9, 8, 3.0, 0) for i, p in enumerate(found)]
    write_pass_rates(tmp_path / "rates.jsonl", {}, rates)
    common = ["checkpoint.every=1", "data.limit=24", "rollout.prompts_per_iteration=8", "rollout.max_new_tokens=24"]
    chosen = [setting.format(rates=tmp_path / "rates.jsonl") for setting in settings]
    small = [*common, "rollout.completions_per_prompt=2", *chosen]
    whole = make_recipe(*small, f"output_dir={tmp_path / 'whole'}")
    run.train(whole)
    stopped = whole.model_copy(update={"output_dir": str(tmp_path / "stopped")})
    train_into_the_third(stopped, monkeypatch)
    run.train(stopped)
    assert left_by(tmp_path / "stopped") == left_by(tmp_path / "whole")
    [one, two] = [read_record(list_checkpoints(r.run_dir / "checkpoints")[-1])["state"] for r in (whole, stopped)]
    seconds = one.pop("seconds"), two.pop("seconds")
    assert all(seconds) and one == two
    if whole.data.rest.solved:
        assert any(until for *_, until in one["standings"].values())
    # Other pass rates are another run, and so is another order.
    if whole.data.curriculum != "none":
        lower = [PassRate(r.prompt, r.problem, min(r.right, 6), 8, 3.0, 0) for r in rates]
        write_pass_rates(tmp_path / "rates.jsonl", {}, lower)
        with pytest.raises(UserError, match="training prompts are others than when"):
            run.train(stopped)
    with pytest.raises(UserError, match=r"was made with data\.rest\.iterations = \d+, the recipe now says 7"):
        run.train(
            stopped.model_copy(
                update={
                    "data": stopped.data.model_copy(
                        update={"rest": stopped.data.rest.model_copy(update={"iterations": 7})}
                    )
                }
            )
        )
