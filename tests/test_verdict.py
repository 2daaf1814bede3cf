"""The verdict at the end of a run: the right words for made-up metrics and for real short runs."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from hapo_lite.cli import run_command
from hapo_lite.recipe import Recipe, load_recipe
from hapo_lite.train.__main__ import main
from hapo_lite.train.curves import PANELS, draw_curves
from hapo_lite.train.intervals import beyond_more_attempts
from hapo_lite.train.verdict import SUCCESS, judge_run
from tests.conftest import ROOT, TINY

HEALTHY = {
    "reward/mean": 0.5,
    "reward/correct_share": 0.5,
    "length/truncated_share": 0.02,
    "grade/unparseable_share": 0.02,
    "grade/timeout_share": 0.0,
    "grade/error_share": 0.0,
    "groups/equal_share": 0.3,
    "groups/discarded": 0,
    "entropy/all_mean": 0.5,
    "ratio/kl_old": 1e-4,
}


def lines(before: list[int] | None, after: list[int] | None, iterations: int = 40, **series) -> list[dict]:
    """metrics.jsonl of a healthy run, but for `series`: a value, or a function of the iteration, by name."""
    out = [{"iteration": 0}] + [{"iteration": i, "updates": 4 * i, **HEALTHY} for i in range(1, iterations + 1)]
    for line in out[1:]:
        for name, value in series.items():
            line[name] = value(line["iteration"]) if callable(value) else value
    if before is not None:
        out[0]["eval/solved"], out[-1]["eval/solved"] = before, after
    return out


def recipe(*overrides: str) -> Recipe:
    return load_recipe(TINY, ["evaluation.samples=4", "rollout.max_new_tokens=1024", *overrides])


# Solved of 4 attempts, by prompt: avg@4 0.25 and 0.5; pass@4 0.5 and 0.5, or 1.
HALF = [2, 0] * 20
MORE_OFTEN = [4, 0] * 20
MORE_OF_THEM = [4, 1] * 20


@pytest.mark.parametrize(
    ("after", "series", "word", "says"),
    [
        # t(39) = 2.0227; the gains are 0.5 and 0.25, of variance 1/62.4, to which 0.25^2 / 40 is added.
        (MORE_OF_THEM, {}, "learned", ["avg@4 rose by 0.375 [0.333, 0.417], pass@4 by 0.500 [0.330, 0.670]"]),
        # Nothing changed in pass@4, which still might have by t / 40.
        (MORE_OFTEN, {}, "sharpened", ["rose by 0.250", "did not (+0.000 [-0.051, +0.051]): the same ones are solved"]),
        # Of 20 that were solved twice, 15 are solved always and 5 no more.
        ([4, 0] * 15 + [0, 0] * 5, {}, "sharpened", ["pass@4 fell by 0.125 [", "fewer are solved, and those more"]),
        ([3, 1] * 2 + [3, 0] * 18, {}, "sharpened", ["pass@4 by +0.050 [-0.037, +0.137]: whether others are solved"]),
        ([1, 0] * 20, {}, "worse", ["fell by 0.125 [0.083, 0.167]", "lower training.learning_rate (0.0005)"]),
        # One prompt in forty: from 0 to 1 of 4 attempts.
        ([2, 1] + [2, 0] * 19, {}, "no difference", ["would not show", "evaluation.prompts (64)"]),
        (HALF, {}, "no difference", ["less than about 0.013 would not show", "raise training.iterations (40)"]),
        (
            HALF,
            {"groups/equal_share": 0.71, "reward/correct_share": 0.04},
            "no difference",
            ["no signal: 71 % of the groups had equal rewards", "4 % of the answers", "easier problems (data.source)"],
        ),
        (
            HALF,
            {"groups/equal_share": 0.8, "reward/correct_share": 0.97},
            "no difference",
            ["80 % of the groups", "harder problems (data.source)", "rollout.dynamic_sampling"],
        ),
        (
            HALF,
            {"groups/equal_share": 0.9, "groups/discarded": 300},
            "no difference",
            ["90 % of the groups", "now and then (data.source)", "rollout.token_budget"],
        ),
        (
            HALF,
            {"length/truncated_share": 0.4},
            "no difference",
            ["40 % of the completions were cut off at 1,024 tokens: raise rollout.max_new_tokens"],
        ),
        (
            HALF,
            {"grade/unparseable_share": 0.97},
            "no difference",
            [r"no answer was found in 97 % of the completions: ask for a \boxed{} in data.system_prompt"],
        ),
        # Those that were cut off have no answer; that is one cause, not two.
        (
            HALF,
            {"length/truncated_share": 0.6, "grade/unparseable_share": 0.62},
            "no difference",
            ["60 % of the completions were cut off"],
        ),
        (HALF, {"grade/timeout_share": 0.08}, "no difference", ["gave up on 8 %", "reward.timeout_s (5)"]),
        (
            HALF,
            {"entropy/all_mean": lambda i: 0.5 if i < 30 else 0.02},
            "no difference",
            ["entropy collapsed at iteration 30, from 0.5 to 0.02 nats: lower training.learning_rate (0.0005)"],
        ),
        (
            [0, 0] * 20,
            {"entropy/all_mean": lambda i: 0.5 + 0.2 * i, "groups/equal_share": 1.0},
            "worse",
            ["entropy rose from 0.7 to 8.5 nats, towards random text: lower training.learning_rate"],
        ),
        (
            [0, 0] * 20,
            {"ratio/kl_old": lambda i: 2.5 if i == 7 else 1e-3},
            "worse",
            ["jumped 2.5 nats away from itself within iteration 7"],
        ),
        (
            HALF,
            {"updates": 0, "update/skipped": 4},
            "no difference",
            ["nothing was trained: all 160 updates were skipped"],
        ),
        (HALF, {"ratio/kl_old": 1e-12}, "no difference", ["hardly moved", "raise training.learning_rate (0.0005)"]),
        (
            MORE_OF_THEM,
            {"groups/equal_share": lambda i: i / 40, "reward/correct_share": 0.97},
            "learned",
            ["the problems are nearly used up: at the end 97 % of the answers were right and 85 % of the groups"],
        ),
    ],
)
def test_every_case_has_its_words_and_its_setting(after, series, word, says):
    verdict = judge_run(lines(HALF, after, **series), recipe())
    told = str(verdict)
    assert verdict.word == word and told.startswith(f"{word}: ")
    for part in says:
        assert part in told, told
    # Nothing is blamed that is not amiss: one cause a case, and none for a healthy run that learned.
    assert len(verdict.because) == (0 if word in SUCCESS and not series else 1)


def test_too_few_iterations_to_tell():
    few = judge_run(lines(HALF, [2, 1] + [2, 0] * 19, iterations=3), recipe())
    assert few.word == "too short"
    assert "in 3 iterations (12 updates, 10 of them warm-up): raise training.iterations" in few.sentence
    assert judge_run(lines(HALF, HALF, iterations=12), recipe("training.warmup_updates=48")).word == "too short"
    assert judge_run(lines(HALF, HALF, iterations=12), recipe("training.warmup_updates=47")).word == "no difference"
    # What is plain to see after three iterations is said.
    assert judge_run(lines(HALF, MORE_OF_THEM, iterations=3), recipe()).word == "learned"


def counts_of(rng: np.random.Generator, rates: np.ndarray, n: int) -> list[int]:
    return rng.binomial(n, np.minimum(rates, 1.0)).tolist()


def words_of(rng, rates: np.ndarray, after: np.ndarray, times: int = 200, n: int = 8) -> list[str]:
    """Verdicts on runs whose prompts, drawn anew, are solved with these rates before and after."""
    settings, words = recipe(f"evaluation.samples={n}"), []
    for _ in range(times):
        drawn = rng.choice(len(rates), 256)
        solved = [counts_of(rng, each[drawn], n) for each in (rates, after)]
        words.append(judge_run(lines(*solved), settings).word)
    return words


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0])
def test_a_policy_that_only_tries_better_is_not_said_to_have_learned(factor):
    """Every rate times a factor: pass@8 rises, and as many more attempts would have solved as much before."""
    rng = np.random.default_rng(0)
    rates = rng.beta(0.8, 19.0, 4000)
    words = words_of(rng, rates, factor * rates)
    assert words.count("learned") <= 0.025 * len(words) + 2
    assert words.count("improved") >= 0.5 * len(words)


def test_a_policy_that_solves_what_it_never_could_has_learned():
    rng = np.random.default_rng(0)
    rates = np.where(rng.random(4000) < 0.5, rng.beta(2.0, 4.0, 4000), 0.0)
    learned = np.where(rates == 0.0, 0.2, 1.2 * rates)
    assert words_of(rng, rates, learned, 50).count("learned") >= 48


def test_the_reach_of_more_attempts_by_hand():
    """Of 40 prompts 10 are solved once of 4 before, and twice after, when 8 others are solved once: r = 28/10.

    1.8 times the share 10/40 could have been solved by more attempts: more than the rise of 8/40.
    """
    before, after = [1] * 10 + [0] * 30, [2] * 10 + [1] * 8 + [0] * 22
    verdict = judge_run(lines(before, after), recipe())
    assert verdict.word == "improved"
    assert "2.8 times as many attempts could have raised pass@4 by up to 0.450" in verdict.sentence
    assert beyond_more_attempts(before, after).mean() == pytest.approx(8 / 40 - 1.8 * 10 / 40)
    none = judge_run(lines([0] * 40, [1] * 20 + [0] * 20), recipe())
    assert none.word == "improved" and "none was solved before" in none.sentence


def test_the_effect_of_each_prompt_on_the_reach_is_that_of_leaving_it_out():
    """The values spread as the mean does: by the jackknife, whose variance is that of the delta method."""
    rng = np.random.default_rng(0)
    rates = rng.beta(1.0, 8.0, 300)
    before, after = rng.binomial(8, rates), rng.binomial(8, np.minimum(2.0 * rates, 1.0))
    values = beyond_more_attempts(before, after)
    left_out = np.array([beyond_more_attempts(np.delete(before, i), np.delete(after, i)).mean() for i in range(300)])
    jackknife = 299 / 300 * ((left_out - left_out.mean()) ** 2).sum()
    assert values.var(ddof=1) / 300 == pytest.approx(jackknife, rel=0.02)


def test_noise_is_not_called_learning():
    """Two evaluations of one policy: hardly ever a verdict, however often it is asked."""
    rng, words = np.random.default_rng(0), []
    for _ in range(40):
        skill = rng.random(64)
        solved = [rng.binomial(4, skill).tolist() for _ in range(2)]
        words.append(judge_run(lines(*solved), recipe()).word)
    assert words.count("no difference") >= 34


def test_symptoms_are_told_beside_success_but_not_blamed_for_it():
    verdict = judge_run(lines(HALF, MORE_OF_THEM, **{"length/truncated_share": lambda i: i / 40}), recipe())
    assert verdict.word == "learned"
    [cut] = verdict.because
    assert cut.startswith("85 % of the completions were cut off at 1,024 tokens, 2 % in the first iteration")


def test_a_low_entropy_that_comes_with_right_answers_is_no_collapse():
    done = {"entropy/all_mean": lambda i: 0.5 / i**2, "reward/correct_share": 0.95}
    assert not any("entropy" in reason for reason in judge_run(lines(HALF, HALF, **done), recipe()).because)


def test_groups_that_are_equal_because_the_policy_came_apart_are_not_blamed_on_the_problems():
    broken = {"ratio/kl_old": 3.0, "groups/equal_share": 1.0, "reward/correct_share": 0.0}
    told = str(judge_run(lines(HALF, [0, 0] * 20, **broken), recipe()))
    assert "jumped" in told and "no signal" not in told


def test_without_evaluations_the_training_reward_is_all_there_is():
    rising = judge_run(lines(None, None, **{"reward/mean": lambda i: i / 40}), recipe("evaluation.prompts=0"))
    assert rising.word == "not measured" and "rose from the first third" in rising.sentence
    assert "set evaluation.prompts" in rising.sentence
    flat = judge_run(lines(None, None, **{"reward/mean": lambda i: i % 2}), recipe("evaluation.prompts=0"))
    assert "did not change for certain" in flat.sentence
    assert "no evaluations to compare" in judge_run(lines(None, None, iterations=1), recipe()).sentence


def test_iterations_that_found_no_group_and_runs_without_any():
    """Under dynamic sampling an iteration may end empty-handed: no entropy, no ratio, no outcome."""
    empty = lines(HALF, HALF, **{"groups/equal_share": 1.0, "groups/discarded": 16})
    for line in empty[1:]:
        for name in ("entropy/all_mean", "ratio/kl_old"):
            del line[name]
    assert "no signal: 100 % of the groups" in str(judge_run(empty, recipe()))
    assert judge_run([{"iteration": 0, "eval/solved": HALF}], recipe()).word == "not measured"


def test_every_setting_that_is_named_exists():
    text = (ROOT / "hapo_lite" / "train" / "verdict.py").read_text()
    named = set(re.findall(r"\b(?:training|rollout|evaluation|data|reward|method|benchmark)\.[a-z_]+\b", text))
    tree = recipe().model_dump()
    for name in named - {"reward.mean"}:
        section, field = name.split(".")
        assert field in tree[section], name
    assert len(named) > 10


@pytest.mark.parametrize(
    ("overrides", "word", "says"),
    [
        (
            ["training.iterations=4", "training.learning_rate=3e-3"],
            SUCCESS,
            ["on 32 held-out prompts"],
        ),
        (
            ["training.iterations=3", "rollout.max_new_tokens=8"],
            ("too short",),
            ["in 3 iterations (12 updates, 10 of them warm-up)", "were cut off at 8 tokens", "no signal: "],
        ),
        (["training.iterations=2", "training.learning_rate=0.03"], ("worse",), ["lower training.learning_rate (0.03)"]),
    ],
)
def test_real_runs(tmp_path, capsys, overrides, word, says):
    warmup = "training.warmup_updates=" + ("10" if word == ("too short",) else "0")
    settings = [f"output_dir={tmp_path}", "evaluation.prompts=32", "evaluation.every=0", "reward.workers=1", warmup]
    assert run_command(main, [str(TINY), *settings, "logging.progress=false", *overrides]) == 0
    summary = json.loads((tmp_path / "tiny_cpu" / "summary.json").read_text())["verdict"]
    printed = capsys.readouterr().out
    assert summary["word"] in word
    assert summary["sentence"] in printed and all(f"- {reason}" in printed for reason in summary["because"])
    for part in says:
        assert part in printed


def test_no_legend_lies_over_the_curves(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig

    def keep(figure, *rest, **more):
        drawn.append(figure)
        save(figure, *rest, **more)

    monkeypatch.setattr(Figure, "savefig", keep)
    keys = [key for _, series in PANELS for key in series]
    draw_curves([{"iteration": i, **dict.fromkeys(keys, 1.0)} for i in range(20)], tmp_path / "curves.png", "run")
    panels = drawn[0].axes
    assert len(panels) == len(PANELS)
    for axes in panels:
        assert not any(axes.get_legend().get_window_extent().overlaps(other.get_window_extent()) for other in panels)
