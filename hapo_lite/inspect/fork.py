"""Fork here: what would have followed, had the completion said something else at one token?

At a token of a completion, the state s is the prompt with all tokens before. Each branch puts one token there: the one
that was sampled, and the likeliest others. The engine writes k continuations of each branch, and the grader counts
those that end right. Axes: A branches, k continuations of each.

- Q(s, a), the share of a branch: how often a completion ends right after token a.
- V(s): the mean of Q(s, a) over the tokens, each by its probability at the temperature of the completion.
- Q(s, a) - V(s), the measured credit of a token: how far it moved the chance of a right answer.

Tokens without a branch have a known probability in all, and what follows them is unknown: somewhere between always
wrong and always right. The intervals of V and of the credit are wider by that probability.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.errors import UserError, counted
from hapo_lite.inspect.generate import LOOK_SECONDS
from hapo_lite.inspect.shares import difference, share_interval, weighted_sum
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import RewardSettings
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn
from hapo_lite.rollout.transformers_engine import TransformersEngine, Watch
from hapo_lite.runs.trace import Trace
from hapo_lite.tasks.answers import find, marked_answer
from hapo_lite.tasks.rewards import Scorer
from hapo_lite.train.intervals import Interval

ROWS = 32
"""Continuations that are written at once."""
MOST_ALTERNATIVES, MOST_CONTINUATIONS = 8, 64
MOST_TOKENS = 131_072
"""Branches x continuations x longest continuation: the tokens that one fork may write."""
MOST_SECONDS = 600.0
CANCELLED, OUT_OF_TIME = "cancelled", "stopped at the time limit"


@dataclass(frozen=True)
class ForkSettings:
    """What a fork is asked for. Raises UserError for a value that is out of range.

    position: the token, counted from 0. gold: the right answer; "": nothing is graded. alternatives: tokens that are
    tried besides the sampled one. continuations: k. tokens: the longest continuation. seconds: the time limit.
    """

    position: int
    gold: str = ""
    alternatives: int = 4
    continuations: int = 24
    tokens: int = 256
    seed: int = 0
    seconds: float = 120.0

    def __post_init__(self) -> None:
        spans = {
            "alternatives": (self.alternatives, 1, MOST_ALTERNATIVES),
            "continuations": (self.continuations, 1, MOST_CONTINUATIONS),
            "longest continuation": (self.tokens, 1, MOST_TOKENS),
            "seed": (self.seed, 0, 2**63),
        }
        for name, (value, least, most) in spans.items():
            if not least <= value <= most:
                raise UserError(f"{name} = {value} is out of range: {least} to {most:,}")
        if not 0.0 < self.seconds <= MOST_SECONDS:
            raise UserError(f"time limit = {self.seconds:g} s is out of range: up to {MOST_SECONDS:g} s")
        branches = self.alternatives + 1
        if branches * self.continuations * self.tokens > MOST_TOKENS:
            raise UserError(
                f"{branches} tokens x {self.continuations} continuations x {self.tokens:,} tokens is "
                f"{branches * self.continuations * self.tokens:,} tokens, more than the {MOST_TOKENS:,} that one fork "
                "may write: ask for fewer or shorter continuations"
            )


@dataclass(frozen=True)
class Continuation:
    """One continuation of a branch. text: what follows the branch's token. outcome: as in `Grade`; "" without a gold
    answer. answer: the one that was found; None for none. truncated: whether the limit cut it off."""

    text: str
    outcome: str
    answer: str | None
    truncated: bool


@dataclass(frozen=True)
class Branch:
    """A token at the fork, and what followed it. probability: of the token, at its own temperature.

    sampled: whether the completion has this token. ends: whether the token ends the completion, so that nothing follows
    and one outcome stands for all.
    """

    token: int
    text: str
    probability: float
    sampled: bool
    ends: bool
    continuations: tuple[Continuation, ...] = ()

    @property
    def right(self) -> int:
        """Continuations that end right."""
        return sum(c.outcome == "correct" for c in self.continuations)

    @property
    def share(self) -> Interval | None:
        """Q(s, a) with its interval; None before anything has been written."""
        count = len(self.continuations)
        if not count:
            return None
        if self.ends:
            return Interval(self.right / count, self.right / count, self.right / count)
        return share_interval(self.right, count)


@dataclass(frozen=True)
class Fork:
    """A fork so far. before: the text before the token. branches: [A], the sampled token first, then by probability.

    graded: whether there is a gold answer. ended: a clause that says why it ended; "" while continuations are written.
    While they are, the shorter ones have come first; at the end the shares have no such bias.
    """

    settings: ForkSettings
    before: str
    branches: tuple[Branch, ...]
    graded: bool
    ended: str = ""

    @property
    def sampled(self) -> Branch:
        """The branch of the token that the completion has."""
        return self.branches[0]

    @property
    def untried(self) -> float:
        """The probability of all tokens without a branch."""
        return max(0.0, 1.0 - sum(branch.probability for branch in self.branches))

    @property
    def measured(self) -> bool:
        """Whether every branch has a share."""
        return self.graded and all(branch.continuations for branch in self.branches)

    @property
    def value(self) -> Interval:
        """V(s): the share right at the fork, whatever token comes. The fork is `measured`."""
        tried = weighted_sum([b.probability for b in self.branches], self._shares)
        return Interval(self._mean(tried.value), tried.low, tried.high + self.untried).within(0.0, 1.0)

    def credit(self, branch: Branch) -> Interval:
        """Q(s, a) - V(s), the measured credit of a branch's token. The fork is `measured`."""
        weights = [float(b is branch) - b.probability for b in self.branches]
        credit = weighted_sum(weights, self._shares)
        tried = sum(b.probability * share.value for b, share in zip(self.branches, self._shares, strict=True))
        value = credit.value + tried - self._mean(tried)
        return Interval(value, credit.low - self.untried, credit.high).within(-1.0, 1.0)

    def against_sampled(self, branch: Branch) -> Interval:
        """Q(s, a) less the share of the sampled token. The fork is `measured`."""
        return difference(_known(branch.share), _known(self.sampled.share))

    @property
    def _shares(self) -> list[Interval]:
        return [_known(branch.share) for branch in self.branches]

    def _mean(self, tried: float) -> float:
        """The mean over the tokens that were tried. tried: the sum of their probability x share."""
        return tried / (1.0 - self.untried) if self.untried < 1.0 else tried


def _known(share: Interval | None) -> Interval:
    if share is None:
        raise ValueError("a branch has no continuations yet")
    return share


def processor_of(trace: Trace, method: Method, temperature: float) -> AdaptiveTemperature:
    """The temperatures that a generation was sampled at. temperature: its base."""
    signal = trace.sampling_signal if method.adaptive_temperature else None
    return AdaptiveTemperature(signal, temperature, method.tau)


@dataclass(frozen=True)
class _Job:
    """One fork under way. prompt: the ids before the fork, those of the completion included. limit: the longest
    continuation, tokens. written: the ids of the completion before the fork."""

    policy: Policy
    settings: ForkSettings
    processor: AdaptiveTemperature
    prompt: Prompt
    ids: list[int]
    written: list[int]
    limit: int
    engine: TransformersEngine = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", TransformersEngine(self.policy, ROWS, self.limit))

    @property
    def key(self) -> DrawKey:
        """Each place of a completion has random numbers of its own, and each token there, by its id."""
        return DrawKey(self.settings.seed, Stage.FORK, self.settings.position)

    def request(self, token: int, sample: int) -> Request:
        """One continuation of the branch of `token`."""
        return Request(EncodedPrompt(token, self.prompt, (*self.ids, token)), sample)


def fork(
    policy: Policy,
    trace: Trace,
    settings: ForkSettings,
    processor: AdaptiveTemperature,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Fork]:
    """Write continuations from one token of a completion, and grade them. The last item is the whole fork.

    trace: the completion. processor: of the temperatures, normally those that the completion was sampled at. cancelled:
    asked about four times a second. A fork that is cancelled or runs out of time leaves out the continuations of the
    batch that was being written, since those that have ended are its shorter ones. The same arguments give the same
    continuations, which do not depend on the other branches. Raises UserError if there is no such token or no room.
    """
    job = _job(policy, trace, settings, processor)
    gold = settings.gold or trace.gold
    deadline = time.monotonic() + settings.seconds
    state = Fork(settings, policy.decode(job.written), _branches(job, trace.tokens["id"]), graded=bool(gold.strip()))
    with policy.unpacked(), Scorer(RewardSettings(workers=1), job.limit) as scorer:
        judge = _Judge(job, scorer, gold if state.graded else "")
        state = _add(state, [(b.token, judge.of_end(b.token)) for b in state.branches if b.ends])
        yield state
        asked = [
            job.request(branch.token, sample)
            for sample in range(settings.continuations)
            for branch in state.branches
            if not branch.ends
        ]
        for start in range(0, len(asked), ROWS):
            part, whole = asked[start : start + ROWS], state
            seen: set[int] = set()
            for batch in job.engine.stream(part, processor, job.key, Watch(job.limit, LOOK_SECONDS)):
                ends = batch.ends()
                fresh = [i for i in range(len(part)) if i not in seen and (ends.stopped[i] or batch.whole)]
                seen.update(fresh)
                rows = [_Row(part[i].prompt.index, batch.ids(i, ends.lengths[i]), not ends.stopped[i]) for i in fresh]
                state = _add(state, list(zip([row.token for row in rows], judge.grade(rows), strict=True)))
                if not batch.whole and (ended := _interrupted(cancelled, deadline)):
                    yield replace(whole, ended=ended)
                    return
                yield state
            if start + ROWS < len(asked) and (ended := _interrupted(cancelled, deadline)):
                yield replace(state, ended=ended)
                return
    yield replace(state, ended="whole")


def _interrupted(cancelled: Callable[[], bool], deadline: float) -> str:
    """The clause of `Fork.ended` if the fork is to end now; else ""."""
    if cancelled():
        return CANCELLED
    return OUT_OF_TIME if time.monotonic() > deadline else ""


def _job(policy: Policy, trace: Trace, settings: ForkSettings, processor: AdaptiveTemperature) -> _Job:
    ids = trace.tokens["id"]
    if not 0 <= settings.position < len(ids):
        held = f"the completion has {counted(len(ids), 'token')}, counted from 0"
        raise UserError(f"{held}: there is no token {settings.position}")
    prompt = Prompt(trace.prompt_id, tuple((role, content) for role, content in trace.messages), trace.gold)
    written = ids[: settings.position]
    before = [*policy.encode(prompt.chat()), *written]
    room = policy.context - len(before) - 1
    if room < 1:
        raise UserError(f"there is no room after token {settings.position}: the model takes {policy.context:,} tokens")
    return _Job(policy, settings, processor, prompt, before, written, min(settings.tokens, room))


def _branches(job: _Job, ids: Sequence[int]) -> tuple[Branch, ...]:
    """The tokens to try. ids: of the completion."""
    seen: list[Tensor] = []

    def note(logits: Tensor, drawn: Drawn) -> None:
        seen.append(torch.softmax(drawn.scores[0].double(), dim=-1))

    here = Request(EncodedPrompt(0, job.prompt, tuple(job.ids)), 0)
    for _ in job.engine.stream([here], job.processor, job.key, Watch(limit=1, drew=note)):
        pass
    [probability] = seen
    own = ids[job.settings.position]
    likeliest = probability.topk(min(job.settings.alternatives + 1, len(probability))).indices.tolist()
    others = [token for token in likeliest if token != own][: job.settings.alternatives]
    texts = job.policy.tokenizer.batch_decode([[token] for token in (own, *others)], skip_special_tokens=False)
    return tuple(
        Branch(token, text, float(probability[token]), token == own, token in job.policy.stop_ids)
        for token, text in zip((own, *others), texts, strict=True)
    )


@dataclass(frozen=True)
class _Row:
    """A continuation that has ended. token: of its branch. ids: those that follow that token."""

    token: int
    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class _Judge:
    """Grades whole completions: the tokens before the fork, the branch's token, and the continuation."""

    job: _Job
    scorer: Scorer
    gold: str

    def of_end(self, token: int) -> Continuation:
        """The outcome of a completion that ends with this token."""
        [continuation] = self.grade([_Row(token, [], truncated=False)])
        return continuation

    def grade(self, rows: Sequence[_Row]) -> list[Continuation]:
        policy, before = self.job.policy, self.job.written
        texts = [policy.opening + policy.decode([*before, row.token, *row.ids]) for row in rows]
        after = [policy.decode(row.ids) for row in rows]
        cut = [row.truncated for row in rows]
        if not self.gold:
            found = [
                marked_answer(text) if row.truncated else find(text).answer
                for text, row in zip(texts, rows, strict=True)
            ]
            return [
                Continuation(text, "", answer, was_cut) for text, answer, was_cut in zip(after, found, cut, strict=True)
            ]
        prompts = [replace(self.job.prompt, answer=self.gold)] * len(rows)
        lengths = [len(before) + 1 + len(row.ids) for row in rows]
        scores = self.scorer.score(prompts, texts, lengths, cut)
        return [
            Continuation(text, score.outcome, score.answer, was_cut)
            for text, score, was_cut in zip(after, scores, cut, strict=True)
        ]


def _add(state: Fork, found: Sequence[tuple[int, Continuation]]) -> Fork:
    """The fork with more continuations. found: (token of the branch, continuation)."""
    if not found:
        return state
    branches = tuple(
        replace(branch, continuations=branch.continuations + tuple(c for token, c in found if token == branch.token))
        for branch in state.branches
    )
    return replace(state, branches=branches)
