"""Verdicts in plain words: on an adapter against its base, and on a training run, with the causes of a poor result.

Pure functions. A sentence about a problem ends with the setting to change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hapo_lite.errors import counted
from hapo_lite.recipe import Recipe
from hapo_lite.train.intervals import (
    Interval,
    beyond_more_attempts,
    mean_interval,
    paired_interval,
    unpaired_interval,
)

Lines = Sequence[Mapping[str, Any]]

CEILING = 0.95
"""With at least this pass@n before training, few problems are left that training could newly solve."""
CUT_OFF = 0.2
"""With at least this share of completions cut off at the limit, the limit distorts the results."""
EQUAL = 0.7
"""With at least this share of groups with equal rewards, most samples teach nothing."""
UNPARSED = 0.5
"""With at least this share of completions without an answer, the format of the answers is a problem."""
UNGRADED = 0.05
"""With at least this share of completions that could not be graded, the grader is a problem."""
COLLAPSED = 0.1
"""The entropy has collapsed below this multiple of the first iteration's entropy."""
SCATTERED = 3.0
"""The policy writes increasingly random text above this multiple of the first iteration's entropy."""
JUMPED = 0.1
"""KL divergence from the old policy within an iteration, nats, that is ten times the normal value."""
STILL = 1e-8
"""KL divergence from the old policy within an iteration, nats, below which hundreds of iterations change little."""
SHORT_RUN = 10
"""A run of fewer iterations without a visible difference is too short for a verdict."""
SOLVED = 0.9
"""With at least this share of correct completions, the problems are solved."""

SUCCESS = ("learned", "improved", "sharpened")
"""The words of a verdict on a model that is right more often."""


@dataclass(frozen=True)
class Verdict:
    """A judgement by 95 % intervals. because: a sentence for each problem to mend.

    word: "learned" (avg@n and pass@n rose, pass@n by more than more attempts could have brought), "improved" (both
    rose, pass@n no further than that), "sharpened" (avg@n rose, pass@n did not), "worse" (avg@n fell) or "no
    difference"; a run can also be "too short" or "not measured".
    """

    word: str
    sentence: str
    because: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([self.sentence, *(f"- {reason}" for reason in self.because)])


def judge(before: Mapping[str, Interval], change: Mapping[str, Interval], n: int, on: str) -> Verdict:
    """The verdict on a change of avg@n and pass@n. on: names the data, such as "64 held-out prompts".

    before: avg@n and pass@n. change: how much each rose, and "beyond", the mean of `beyond_more_attempts`.
    """
    avg, best = change[f"avg@{n}"], change[f"pass@{n}"]
    if avg.below_zero:
        return Verdict("worse", f"worse: avg@{n} fell by {_plain(avg, -1)} on {on}")
    if not avg.above_zero:
        limit = "one prompt says nothing about others"
        if avg.known:
            limit = f"less than about {avg.high - avg.value:.3f} would not show"
        return Verdict("no difference", f"no difference: avg@{n} changed by {signed(avg)} on {on}; {limit}")
    rose = f"avg@{n} rose by {_plain(avg)}"
    if best.above_zero:
        both = rose if n == 1 else f"{rose}, pass@{n} by {_plain(best)}"
        if change["beyond"].above_zero:
            return Verdict("learned", f"learned: {both} on {on}")
        return Verdict("improved", f"improved: {both} on {on}; {_within_reach(before[f'avg@{n}'].value, change, n)}")
    if best.below_zero:
        why = "fewer are solved, and those more often"
        return Verdict("sharpened", f"sharpened: {rose} on {on}, pass@{n} fell by {_plain(best, -1)}: {why}")
    solved_before = before[f"pass@{n}"].value
    told = f"pass@{n} did not ({signed(best)})"
    why = "the same ones are solved, more often"
    if solved_before >= CEILING:
        why = (
            f"{percent(solved_before)} of them were solved in {counted(n, 'attempt')} before, so there was hardly "
            "anything new to find"
        )
    elif best.value > 0.0:
        told, why = f"pass@{n} by {signed(best)}", "whether others are solved too cannot be told"
    return Verdict("sharpened", f"sharpened: {rose} on {on}, {told}: {why}")


def _within_reach(accuracy: float, change: Mapping[str, Interval], n: int) -> str:
    """Why a rise of pass@n need not be learning. accuracy: avg@n before."""
    if accuracy == 0.0:
        return f"none was solved before, so nothing is known of what more than {counted(n, 'attempt')} would have found"
    if n == 1:
        return "one attempt at each does not tell whether others are solved, or the same ones more often"
    factor = 1.0 + change[f"avg@{n}"].value / accuracy
    found = change[f"pass@{n}"].value - change["beyond"].value
    return (
        f"{factor:.1f} times as many attempts could have raised pass@{n} by up to {found:.3f}, so whether the new ones "
        "were out of reach cannot be told"
    )


def judge_run(lines: Lines, recipe: Recipe) -> Verdict:
    """The verdict on a finished run. lines: metrics.jsonl from iteration 0 on."""
    trained = [line for line in lines if line["iteration"] > 0]
    verdict = judge_held_out(lines, recipe) or _training_reward(trained)
    if verdict.word in SUCCESS:
        return replace(verdict, because=(*_obstacles(trained, recipe), *_used_up(trained)))
    causes = _causes(trained, recipe)
    count = len(trained)
    updates = trained[-1]["updates"] if trained else 0
    skipped = sum(line.get("update/skipped", 0) for line in trained)
    if skipped and not updates:
        reason = f"nothing was trained: all {skipped:,} updates were skipped, for the reasons in the notes of the run"
        return replace(verdict, because=(reason,))
    warmup = recipe.training.warmup_updates
    if verdict.word == "no difference" and (count < SHORT_RUN or updates <= warmup):
        changed = verdict.sentence.removeprefix("no difference: ").split(";")[0]
        told = f"{counted(count, 'iteration')} ({counted(updates, 'update')}, {min(updates, warmup)} of them warm-up)"
        verdict = Verdict("too short", f"too few iterations to tell: {changed} in {told}: raise training.iterations")
    elif verdict.word == "worse" and not causes:
        causes = [f"nothing else is amiss: lower training.learning_rate ({recipe.training.learning_rate:g})"]
    elif verdict.word == "no difference" and not causes:
        causes = [
            f"nothing else is amiss: raise training.iterations ({count}), training.learning_rate "
            f"({recipe.training.learning_rate:g}), or evaluation.prompts ({recipe.evaluation.prompts}) to see smaller "
            "differences"
        ]
    return replace(verdict, because=tuple(causes))


def _causes(trained: Lines, recipe: Recipe) -> list[str]:
    """Sentences about what kept a run from learning."""
    unstable = list(_unstable(trained, recipe))
    obstacles = list(_obstacles(trained, recipe))
    if unstable:
        # A policy that has come apart gives equal groups too, and easier problems would not mend that.
        return [*unstable, *obstacles]
    return [*obstacles, *(list(_no_signal(trained, recipe)) or _still(trained, recipe))]


def judge_held_out(lines: Lines, recipe: Recipe) -> Verdict | None:
    """The verdict by the first and the last evaluation, prompt by prompt; None without two evaluations."""
    n = recipe.evaluation.samples
    evaluated = [line for line in lines if "eval/solved" in line]
    if len(evaluated) < 2 or evaluated[0]["iteration"] != 0:
        return None
    first, last = (np.array(evaluated[i]["eval/solved"]) for i in (0, -1))
    before = {
        f"avg@{n}": mean_interval(first / n, step=1.0 / n),
        f"pass@{n}": mean_interval(first > 0, step=1.0),
    }
    change = {
        f"avg@{n}": paired_interval(first / n, last / n, step=1.0 / n),
        f"pass@{n}": paired_interval(first > 0, last > 0, step=1.0),
        "beyond": mean_interval(beyond_more_attempts(first, last), step=1.0),
    }
    return judge(before, change, n, f"{len(first):,} held-out prompts")


def _training_reward(trained: Lines) -> Verdict:
    """The verdict on a run without evaluations, by its training reward."""
    ask = "set evaluation.prompts to measure on prompts that it is not trained on"
    rewards = [line["reward/mean"] for line in trained]
    third = len(trained) // 3
    if third < 3:
        return Verdict("not measured", f"not measured: there are no evaluations to compare; {ask}")
    change = unpaired_interval(rewards[:third], rewards[-third:])
    way = "did not change for certain"
    if change.above_zero:
        way = "rose"
    elif change.below_zero:
        way = "fell"
    return Verdict(
        "not measured",
        f"not measured: the training reward {way} from the first third of the iterations to the last "
        f"({signed(change)}); {ask}",
    )


def _obstacles(trained: Lines, recipe: Recipe) -> Iterator[str]:
    """Sentences about problems with giving and grading answers, over the last third of the run."""
    cut = _late(trained, "length/truncated_share")
    unparsed = _late(trained, "grade/unparseable_share")
    ungraded = _late(trained, "grade/timeout_share") + _late(trained, "grade/error_share")
    if cut >= CUT_OFF:
        at_first = _mean(trained[:1], "length/truncated_share")
        grown = f", {percent(at_first)} in the first iteration" if at_first < CUT_OFF / 2 else ""
        yield (
            f"{percent(cut)} of the completions were cut off at {recipe.rollout.max_new_tokens:,} tokens{grown}: raise "
            "rollout.max_new_tokens"
        )
    # Completions that are cut off seldom have an answer, and the sentence above covers them.
    if unparsed >= UNPARSED and unparsed - cut >= CUT_OFF:
        yield (
            f"no answer was found in {percent(unparsed)} of the completions: ask for a \\boxed{{}} in "
            "data.system_prompt, or start from a model that writes one"
        )
    if ungraded >= UNGRADED:
        yield (
            f"grading gave up on {percent(ungraded)} of the completions: raise reward.timeout_s "
            f"({recipe.reward.timeout_s:g}), or lower reward.workers ({recipe.reward.workers}) if memory is short"
        )


def _no_signal(trained: Lines, recipe: Recipe) -> Iterator[str]:
    """A sentence about groups with equal rewards, if they prevail over the whole run."""
    equal = _mean(trained, "groups/equal_share")
    right = _mean(trained, "reward/correct_share")
    if equal < EQUAL:
        return
    if any(line["groups/discarded"] for line in trained):
        # The share of correct answers is known for the kept groups only, so it does not tell easy from hard problems.
        advice = "choose problems that this model solves now and then (data.source), or raise rollout.token_budget"
    elif right < 0.5:
        size = recipe.rollout.completions_per_prompt
        advice = (
            f"{percent(right)} of the answers were right: choose easier problems (data.source), or larger groups "
            f"(rollout.completions_per_prompt, {size})"
        )
    else:
        advice = (
            f"{percent(right)} of the answers were right: choose harder problems (data.source), or switch "
            "rollout.dynamic_sampling on"
        )
    yield f"no signal: {percent(equal)} of the groups had equal rewards, which teach nothing; {advice}"


def _unstable(trained: Lines, recipe: Recipe) -> Iterator[str]:
    """Sentences about entropy that collapsed or exploded, and about steps that were too large."""
    rate = f"training.learning_rate ({recipe.training.learning_rate:g})"
    entropies = [(line["iteration"], line["entropy/all_mean"]) for line in trained if "entropy/all_mean" in line]
    if len(entropies) > 3:
        # The first iteration's entropy is that of the policy before training.
        start = entropies[0][1]
        last = [value for _, value in entropies[-3:]]
        if max(last) < COLLAPSED * start and _late(trained, "reward/correct_share") < SOLVED:
            last_above = max(i for i, (_, value) in enumerate(entropies) if value >= COLLAPSED * start)
            when, value = entropies[last_above + 1]
            yield (
                f"entropy collapsed at iteration {when}, from {start:.2g} to {value:.2g} nats: lower {rate}, or raise "
                f"method.eps_high ({recipe.method.eps_high:g})"
            )
        if min(last) > SCATTERED * start:
            yield f"entropy rose from {start:.2g} to {last[-1]:.2g} nats, towards random text: lower {rate}"
    jumps = [(line["ratio/kl_old"], line["iteration"]) for line in trained if line.get("ratio/kl_old", 0.0) > JUMPED]
    if jumps:
        size, when = max(jumps)
        yield f"the policy jumped {size:.2g} nats away from itself within iteration {when}: lower {rate}"


def _still(trained: Lines, recipe: Recipe) -> Iterator[str]:
    """A sentence about a policy that hardly moved. With one update an iteration every ratio is 1 and shows nothing."""
    moved = [line["ratio/kl_old"] for line in trained if "ratio/kl_old" in line]
    if moved and max(moved) < STILL and recipe.training.updates_per_iteration > 1:
        yield (
            f"the policy hardly moved, at most {max(moved):.1g} nats within an iteration: raise "
            f"training.learning_rate ({recipe.training.learning_rate:g})"
        )


def _used_up(trained: Lines) -> Iterator[str]:
    """A sentence about problems that are nearly all solved at the end of the run."""
    equal = _late(trained, "groups/equal_share")
    right = _late(trained, "reward/correct_share")
    if equal >= EQUAL and right >= SOLVED:
        yield (
            f"the problems are nearly used up: at the end {percent(right)} of the answers were right and "
            f"{percent(equal)} of the groups had equal rewards; harder ones (data.source) would teach more"
        )


def _mean(lines: Lines, key: str) -> float:
    values = [line[key] for line in lines if key in line]
    return float(np.mean(values)) if values else 0.0


def _late(trained: Lines, key: str) -> float:
    """Mean over the last third of the iterations."""
    return _mean(trained[-max(1, len(trained) // 3) :], key)


def percent(share: float) -> str:
    """0.25 -> "25 %"."""
    return f"{100 * share:.0f} %"


def signed(change: Interval, digits: int = 3) -> str:
    """A change with its sign and interval, such as "+0.120 [+0.050, +0.190]"; one value has no interval."""
    if not change.known:
        return f"{change.value:+.{digits}f}"
    return f"{change.value:+.{digits}f} [{change.low:+.{digits}f}, {change.high:+.{digits}f}]"


def _plain(change: Interval, sign: int = 1) -> str:
    """A change without its sign, such as "0.120 [0.050, 0.190]". sign: -1 for a fall."""
    low, high = sorted((sign * change.low, sign * change.high))
    return f"{sign * change.value:.3f} [{low:.3f}, {high:.3f}]"
