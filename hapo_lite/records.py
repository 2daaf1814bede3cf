"""The records that pass between the stages of an iteration, axes named.

Axes: B completions, T completion tokens (padded on the right), L prompt and completion tokens together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import LossInputs, loss_weights
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import TokenSignals, trained_tokens


@dataclass(frozen=True)
class Prompt:
    """One problem. messages: the chat before the answer, as pairs (role, content). answer: the gold answer.

    solution: a worked solution that ends in the answer; "" unless the data were read with their solutions. columns:
    further columns of the data row, by name: those that a reward function asks for, and no others.
    """

    id: str
    messages: tuple[tuple[str, str], ...]
    answer: str
    solution: str = ""
    columns: dict[str, Any] = field(default_factory=dict, hash=False)

    def chat(self) -> list[dict[str, str]]:
        """The messages as a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its token ids.

    index: in training its position in the stream, else its place in the data. It seeds the samples and names the group.
    """

    index: int
    prompt: Prompt
    ids: tuple[int, ...]


class GroupResult(NamedTuple):
    """How a group of completions was graded. prompt: the id of its prompt. right, attempts: completions."""

    prompt: str
    right: int
    attempts: int


class Standing(NamedTuple):
    """What a run knows of one training prompt.

    right, attempts: completions, earlier groups counting less than later ones. solved_in_a_row: its latest groups that
    were right throughout. rests_until: the last iteration in which it rests.
    """

    right: float = 0.0
    attempts: float = 0.0
    solved_in_a_row: int = 0
    rests_until: int = 0


@dataclass(frozen=True)
class Request:
    """A request to sample one completion. sample: its number among the completions of its prompt."""

    prompt: EncodedPrompt
    sample: int


@dataclass(frozen=True)
class Completion:
    """One sampled completion. The tensors are on the CPU, [T] each; T is its length, which includes the stop token.

    base_logp, entropy: log-probability and entropy under the policy at the base temperature, nats. sampling_logp:
    log-probability under the distribution that the token was drawn from, at its own temperature. truncated: the
    completion ended at the length limit, not at a stop token.
    """

    prompt: EncodedPrompt
    sample: int
    ids: Tensor
    text: str
    truncated: bool
    sampling_logp: Tensor
    base_logp: Tensor
    entropy: Tensor
    temperature: Tensor

    @property
    def length(self) -> int:
        """The number of tokens, stop token included."""
        return self.ids.shape[0]


class Written(Protocol):
    """A prompt and the tokens that follow it, [T] of them: a completion, or a worked solution."""

    @property
    def prompt(self) -> EncodedPrompt: ...
    @property
    def ids(self) -> Tensor: ...
    @property
    def length(self) -> int: ...


@dataclass(frozen=True)
class Sequences:
    """A micro-batch, padded on the right.

    ids: [B, L]. prompt_lengths, lengths: [B], tokens of each prompt and of each completion. mask: bool [B, T], true on
    real tokens. The mask comes from the lengths alone: a token's value never decides whether it counts.
    """

    ids: Tensor
    prompt_lengths: Tensor
    lengths: Tensor
    mask: Tensor

    def only(self, tokens: Tensor) -> Sequences:
        """The same with a mask of those real tokens that `tokens` has too: bool [B, T], on the same device."""
        return replace(self, mask=self.mask & tokens)

    @classmethod
    def of(cls, completions: Sequence[Written], device: torch.device | str = "cpu") -> Sequences:
        """The micro-batch of these completions with their prompts, on `device`."""
        rows = [torch.cat([torch.tensor(c.prompt.ids, dtype=torch.long), c.ids]) for c in completions]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([c.length for c in completions])
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        prompt_lengths = torch.tensor([len(c.prompt.ids) for c in completions])
        return cls(*(put(t, device) for t in (ids, prompt_lengths, lengths, mask)))


def put(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU on `device`.

    The host does not wait until a GPU is done with what it does: CUDA keeps a copy of ordinary memory until then.
    """
    return tensor.to(device, non_blocking=True)


def pad(rows: Sequence[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """[T_i] tensors of the CPU -> [B, T] on `device`, zeros on the right."""
    return put(torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), device)


@dataclass(frozen=True)
class Score:
    """The grade of one completion. reward: what training learns from. rewards: its parts by name, before their weights;
    empty without `reward.functions`. The other fields are as in tasks.verify.Grade."""

    reward: float
    correct: bool
    outcome: str
    answer: str | None
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Graded:
    """B completions and their B scores. The completions of one prompt stand next to one another."""

    completions: list[Completion]
    scores: list[Score]

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def rewards(self) -> Tensor:
        """[B], fp64."""
        return torch.tensor([score.reward for score in self.scores], dtype=torch.float64)

    def rewards_of(self, name: str) -> Tensor:
        """[B], fp64: one of the named rewards."""
        return torch.tensor([score.rewards[name] for score in self.scores], dtype=torch.float64)

    @property
    def sequence_lengths(self) -> list[int]:
        """The number of tokens of each sequence, prompt included, B numbers."""
        return [len(c.prompt.ids) + c.length for c in self.completions]

    def select(self, rows: Sequence[int]) -> Graded:
        """The completions at these places, in this order."""
        return Graded([self.completions[i] for i in rows], [self.scores[i] for i in rows])


@dataclass(frozen=True)
class Experience(Graded):
    """All that an iteration's updates need: completions, scores, and the old policy's view of every token.

    advantage: [B], fp32. old_logp, entropy (nats), h, uncertain (bool): one [T] per completion, from the policy before
    the first update, at the base temperature. signal: the signal fitted to all entropies. scale: [B], EDGE-GRPO's
    factor on the advantage. The others are one [T] per completion, or None unless the method needs them.
    reference_logp: log-probabilities of the base model. factor: on the advantage of each token. drawn: bool, the tokens
    that `trained_tokens: random` trains. kept: bool, the tokens that `token_share` lets an update compute.
    """

    advantage: Tensor
    old_logp: list[Tensor]
    entropy: list[Tensor]
    signal: EntropySignal
    h: list[Tensor]
    uncertain: list[Tensor]
    scale: Tensor
    reference_logp: list[Tensor] | None
    factor: list[Tensor] | None = None
    drawn: list[Tensor] | None = None
    kept: list[Tensor] | None = None

    def trained(self, method: Method) -> list[Tensor]:
        """Which tokens count in the loss: one bool [T] per completion. Those that `token_share` drops count too."""
        drawn: Sequence[Tensor | None] = self.drawn or [None] * len(self)
        rows = zip(self.completions, self.uncertain, drawn, strict=True)
        return [trained_tokens(method, uncertain, c.truncated, own) for c, uncertain, own in rows]

    def select(self, rows: Sequence[int]) -> Experience:
        """The rows of the experience at these places, in this order. The signal stays that of the whole iteration."""
        graded = super().select(rows)
        return replace(
            self,
            completions=graded.completions,
            scores=graded.scores,
            advantage=self.advantage[list(rows)],
            old_logp=[self.old_logp[i] for i in rows],
            entropy=[self.entropy[i] for i in rows],
            h=[self.h[i] for i in rows],
            uncertain=[self.uncertain[i] for i in rows],
            scale=self.scale[list(rows)],
            reference_logp=_at(rows, self.reference_logp),
            factor=_at(rows, self.factor),
            drawn=_at(rows, self.drawn),
            kept=_at(rows, self.kept),
        )

    def padded(self, method: Method, device: torch.device | str = "cpu") -> LossInputs:
        """All completions as one micro-batch, right-padded. One that the method leaves out has weight 0 everywhere."""
        mask = pad([torch.full((c.length,), not method.leaves_out(c.truncated)) for c in self.completions], device)
        weights = loss_weights(mask, method.loss_average, pad(self.trained(method), device))
        if self.kept is not None:
            weights = weights * pad(self.kept, device) / method.token_share
        return LossInputs(
            old_logp=pad(self.old_logp, device),
            advantage=put(self.advantage, device),
            tokens=TokenSignals(
                pad(self.h, device),
                pad(self.entropy, device),
                pad(self.uncertain, device),
                put(self.scale, device),
                None if self.factor is None else pad(self.factor, device),
                None if self.drawn is None else pad(self.drawn, device),
            ),
            weights=weights,
            sampling_logp=pad([c.sampling_logp for c in self.completions], device),
            reference_logp=None if self.reference_logp is None else pad(self.reference_logp, device),
        )


def _at(rows: Sequence[int], held: list[Tensor] | None) -> list[Tensor] | None:
    """The entries at these places, if there are any."""
    return None if held is None else [held[i] for i in rows]


@dataclass(frozen=True)
class TokenOutcome:
    """The effect of one update on one completion. The tensors are [T], on the CPU.

    advantage: that of the completion within its group. old_logp, entropy: log-probability and entropy under the policy
    before the iteration's first update, at the base temperature, nats. h: the entropy signal. uncertain: bool, above
    the method's quantile. logp: log-probability at the moment of the update. credit: the final advantage of each token.
    lower, upper: bounds on the ratio or, where there is one, on `measure` (`algo.surrogate`): None if the ratio is what
    they hold. trained: bool, whether a token could have a gradient. kl_base: divergence from the base model, nats; None
    for a method without a KL weight, and for a completion that the method leaves out. computed: bool, whether the
    update computed it; None: all. One that was not has the old policy's log-probability, the ratio 1 and no credit.
    """

    advantage: float
    old_logp: Tensor
    entropy: Tensor
    h: Tensor
    uncertain: Tensor
    logp: Tensor
    ratio: Tensor
    credit: Tensor
    lower: Tensor
    upper: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    trained: Tensor
    kl_base: Tensor | None = None
    measure: Tensor | None = None
    computed: Tensor | None = None

    def of_computed(self) -> TokenOutcome:
        """The same for the tokens that the update computed alone."""
        if self.computed is None:
            return self
        rows: dict[str, Any] = {name: x[self.computed] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **rows)
