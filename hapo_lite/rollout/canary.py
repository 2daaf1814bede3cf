"""The check before training: does the engine sample from the policy that is trained, adapter included?

With an engine whose weights are out of date, or that leaves the adapter out, training fails without an error. The check
therefore perturbs the adapter and tests whether the engine's log-probabilities follow the trainer's.

Two right computations differ by rounding, whose size depends on the model and its dtype. To measure it, the trainer
also scores the same tokens one by one through a cache, as a sampler computes them, and is compared with itself.

Axes: N sampled tokens of all completions, T tokens of one completion, D hidden.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache

from hapo_lite.errors import UserError
from hapo_lite.model.decoder import head_input
from hapo_lite.model.policy import Policy
from hapo_lite.model.refusals import own_errors
from hapo_lite.recipe import RolloutSettings
from hapo_lite.records import Completion, EncodedPrompt, Request, Sequences, pad, put
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.engine import Engine
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import pad_left, positions

PROMPTS, TOKENS, OFFERED = 4, 16, 32
"""Two samples are taken of PROMPTS completions with at most TOKENS tokens each, for the shortest of the first OFFERED
prompts that are not too long."""
MOVE = 1.0
"""Mean distance that the perturbation should move the trainer's log-probabilities, nats per token. It is far above
rounding, and small enough that the model still gives sensible answers."""
LEAST = 0.02
"""Smallest such distance, nats per token, that a trainable model can be moved."""
SMALLEST, LARGEST, ATTEMPTS = 1e-3, 1e3, 12
"""Bounds on the norm of the perturbation, and the number of norms tried."""
SAME, ALIKE, FOREIGN = 0.25, 1.0, 1.6
"""Multiples of the floor, which is the distance that rounding makes. An engine within SAME of the trainer's own steps
at rest rounds as they do, and must then stay within ALIKE of them. Any other engine must stay within FOREIGN of the
trainer."""
MOST_FLOOR, MOST_FLOOR_16 = 0.02, 0.2
"""The largest floor at rest that rounding can make, nats, in fp32 and in 16 bits. Real models have 1e-6 and 0.03."""
SLACK, SHARE = 1e-3, 0.005
"""Allowances added for dtypes that hardly round: nats at rest, and a fraction of the move when perturbed."""


@dataclass(frozen=True)
class Distance:
    """Mean absolute differences of log-probabilities over the sampled tokens, nats.

    engine: engine and trainer. steps: engine and the trainer's token-by-token pass. floor: that pass and the trainer.
    rounded: as floor, with logits rounded to the compute dtype, as a head without fp32 sums computes them.
    """

    engine: float
    steps: float
    floor: float
    rounded: float

    def share(self, alike: bool, slack: float) -> float:
        """The distance as a fraction of what is allowed. alike: as in `Canary`; slack: nats allowed in any dtype."""
        if alike:
            return self.steps / (ALIKE * self.floor + slack)
        return self.engine / (FOREIGN * max(self.floor, self.rounded) + slack)


@dataclass(frozen=True)
class Canary:
    """The result of the check.

    at_rest, perturbed: the distances with the adapter as it is, and perturbed. moved: mean absolute change of the
    trainer's log-probabilities by the perturbation, nats per token, for the tokens sampled under it. followed: the
    fraction of that change that the engine made too; 1 for a right engine.
    """

    at_rest: Distance
    perturbed: Distance
    moved: float
    followed: float

    @property
    def alike(self) -> bool:
        """Whether the engine rounds as the trainer's own steps do, judged by its distance to them at rest."""
        return self.at_rest.steps <= SAME * self.at_rest.floor

    @property
    def shares(self) -> tuple[float, float]:
        """The distances at rest and perturbed, each as a fraction of what is allowed."""
        return self.at_rest.share(self.alike, SLACK), self.perturbed.share(self.alike, SHARE * self.moved)

    @property
    def right(self) -> bool:
        # The comparison is false for a share that is not a number.
        return all(share <= 1.0 for share in self.shares)

    def __str__(self) -> str:
        return (
            f"{self.at_rest.engine:.1e} nats from the trainer's, where rounding alone makes {self.at_rest.floor:.1e}; "
            f"with an adapter perturbed by {self.moved:.2g} nats {self.perturbed.engine:.1e}, where rounding makes "
            f"{self.perturbed.floor:.1e}, and they follow {self.followed:.1%} of the change"
        )

    def meaning(self) -> str:
        """The likely fault of an engine that is not right, as a clause."""
        if not self.shares[0] <= 1.0:
            return "its base, or its adapter, is another one even before the adapter is perturbed"
        return (
            "the adapter that it samples with is not the current one: it is left out, a step old, at another scale "
            "(model.lora.alpha / model.lora.rank), or incomplete"
        )


def check_engine(
    engine: Engine,
    policy: Policy,
    prompts: Iterable[EncodedPrompt | None],
    settings: RolloutSettings,
    seed: int,
    accelerator: Accelerator,
) -> Canary:
    """Sample a few tokens with the adapter as it is and perturbed, and compare the engine with the trainer.

    prompts: None in place of those that are too long. The adapter is the same afterwards, to the last bit. Raises
    UserError with the numbers if the engine is not right; if it is wrong in one process, it is raised in all.
    """
    with own_errors(str(policy.base.name_or_path), policy.dense is not None):
        found = compare(engine, policy, prompts, settings, seed)
    wrong = torch.tensor(float(not found.right), device=accelerator.device)
    if accelerator.reduce(wrong, "sum") > 0:
        if found.right:
            raise UserError("another process found that its engine does not sample from the policy that is trained")
        raise UserError(
            f"rollout.engine = {settings.engine} does not sample from the policy that is trained: its "
            f"log-probabilities are {found}; {_cause(found, settings.engine)}; {_advice(settings.engine)}"
        )
    return found


def compare(
    engine: Engine, policy: Policy, prompts: Iterable[EncodedPrompt | None], settings: RolloutSettings, seed: int
) -> Canary:
    """The measurements that `check_engine` judges.

    Raises UserError if there is no prompt, or if no change of the adapter moves the policy.
    """
    offered = itertools.islice((prompt for prompt in prompts if prompt is not None), OFFERED)
    some = few_prompts(sorted(offered, key=lambda prompt: len(prompt.ids)))
    if not some:
        raise UserError("every prompt of the training data is too long: raise data.max_prompt_tokens")
    requests = [Request(prompt, sample) for sample in range(PROMPTS) for prompt in some][:PROMPTS]

    def sampled() -> list[Completion]:
        processor = AdaptiveTemperature(
            None, settings.temperature, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p
        )
        return engine.sample(requests, processor, DrawKey(seed, Stage.CANARY, iteration=0), limit=TOKENS)

    with policy.unpacked(exact=True):
        before = sampled()
        resting = trainer_logp(policy, before, settings.temperature)
        at_rest = measure(policy, before, resting, settings.temperature)
        check_floor(policy, at_rest.floor)
        directions = blockwise_directions(policy, before, settings.temperature, seed)
        strength = strength_for(policy, before, resting, settings.temperature, directions)
        with perturbed_adapter(directions, strength):
            after = sampled()
            moved_to = trainer_logp(policy, after, settings.temperature)
            perturbed = measure(policy, after, moved_to, settings.temperature)
        moved_from = trainer_logp(policy, after, settings.temperature)
    change = (moved_to - moved_from).double()
    followed = ((engine_logp(after) - moved_from).double() * change).sum() / change.square().sum()
    return Canary(at_rest, perturbed, float(change.abs().mean()), float(followed))


def check_floor(policy: Policy, floor: float) -> None:
    """Raise UserError if the trainer's two ways to compute the same tokens differ by more than rounding explains.

    floor: of the distance at rest.
    """
    most = MOST_FLOOR if policy.dtype == torch.float32 else MOST_FLOOR_16
    if floor > most:
        raise UserError(
            f"model.name = {policy.base.name_or_path} cannot be trained: token by token, with a cache and beside a "
            f"padded prompt, it computes other log-probabilities than in one pass, by {floor:.2g} nats where rounding "
            f"makes less than {most:g}; choose another model"
        )


def few_prompts(offered: Sequence[EncodedPrompt]) -> list[EncodedPrompt]:
    """The prompts of the check, from prompts in order of length.

    There are fewer than completions, so that a prompt is read for two of them, and their lengths differ if any do, so
    that one of them is padded.
    """
    some = list(offered[: PROMPTS - 1])
    longer = (prompt for prompt in offered[len(some) :] if len(prompt.ids) > len(some[0].ids))
    if some and len(some[-1].ids) == len(some[0].ids):
        some[-1] = next(longer, some[-1])
    return some


def _cause(found: Canary, engine: str) -> str:
    """The likely fault, as a clause. The default engine has no base of its own that could be another one."""
    if engine == "transformers" and not found.shares[0] <= 1.0:
        return (
            "the two differ even before the adapter is perturbed, on the same weights, so the trainer computes this "
            "architecture in another way than the model does"
        )
    return found.meaning()


def _advice(engine: str) -> str:
    if engine == "transformers":
        return "this engine is the reference, so please report this sentence with the model's name"
    return "use rollout.engine=transformers, or other versions of the engine's packages"


def measure(policy: Policy, completions: Sequence[Completion], trainer: Tensor, temperature: float) -> Distance:
    """Distances between engine, trainer and the trainer's token-by-token pass, with the adapter as it is.

    trainer: [N], from `trainer_logp`.
    """
    own = engine_logp(completions)
    steps, rounded = stepwise_logp(policy, completions, temperature)
    return Distance(distance(own, trainer), distance(own, steps), distance(steps, trainer), distance(rounded, trainer))


@torch.no_grad()
def trainer_logp(policy: Policy, completions: Sequence[Completion], temperature: float) -> Tensor:
    """Log-probabilities as training computes them, concatenated over the completions: [N], on the CPU."""
    batch = Sequences.of(completions, policy.device)
    return policy.completion_logprobs(batch, temperature)[0][batch.mask].cpu()


@torch.no_grad()
def stepwise_logp(policy: Policy, completions: Sequence[Completion], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the same policy, computed token by token through a cache as a sampler does: [N], on the CPU.

    Returned twice: with fp32 logits, and with logits rounded to the policy's dtype.
    """
    states = torch.cat(_row_states(policy, completions) if policy.steps else _lone_states(policy, completions))
    targets = put(torch.cat([c.ids for c in completions]), policy.device)
    exact, _ = policy.token_logprobs(states, targets, temperature)
    return exact.cpu(), policy.rounded_logprobs(states, targets, temperature).cpu()


def _row_states(policy: Policy, completions: Sequence[Completion]) -> list[Tensor]:
    """The head's input for each token of each completion, [T, D], computed token by token."""
    ids, mask = pad_left([c.prompt for c in completions], policy.tokenizer.pad_token_id, policy.device)
    tokens, found = pad([c.ids for c in completions], policy.device), []
    cache = DynamicCache(config=policy.base.config.get_text_config())
    # A policy may sample outside autocast; this pass has the trainer's precision all the same.
    with policy.sampling(), policy.autocast():
        for step in range(tokens.shape[1]):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
            found.append(head_input(policy.base, policy.whole, cache, **inputs)[:, -1])
            ids, mask = tokens[:, step : step + 1], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [row[: c.length] for row, c in zip(torch.stack(found, dim=1), completions, strict=True)]


def _lone_states(policy: Policy, completions: Sequence[Completion]) -> list[Tensor]:
    """The head's input as in `_row_states`, for a model whose decoder cannot be called token by token.

    Each completion is computed alone, because other shapes round differently too.
    """
    found = []
    for c in completions:
        ids = torch.cat([torch.tensor(c.prompt.ids), c.ids])[None].to(policy.device)
        with policy.autocast():
            found.append(policy.hidden_states(ids)[0, len(c.prompt.ids) - 1 : -1])
    return found


Direction = tuple[nn.Parameter, Tensor]
"""A parameter of the adapter, and the change of it by a perturbation of strength 1."""
MAGNITUDE = "lora_magnitude_vector"
PERTURBED = ("lora_B", "lora_embedding_B", MAGNITUDE)
"""The parameters that are perturbed, by a part of their names. A new adapter's A has no gradient, because B is 0."""


def blockwise_directions(
    policy: Policy, completions: Sequence[Completion], temperature: float, seed: int
) -> list[Direction]:
    """A direction for every B matrix of the adapter, in which the tokens' log-probabilities change evenly.

    It is the gradient of the sum of log-probabilities, scaled so that every block of layers changes that sum equally,
    with a seeded sign for each block. Noise on all weights would hardly move log-probabilities until it destroys the
    model. The signs keep the effects of the blocks on a token from being alike, so a missing block is noticed. DoRA's
    magnitudes are blocks of their own, so magnitudes that are left out or out of date are noticed too. The list is
    empty where no parameter has a finite gradient above 0.
    """
    batch = Sequences.of(completions, policy.device)
    logp, _ = policy.completion_logprobs(batch, temperature)
    parameters = policy.trainable()
    logp[batch.mask].sum().backward()
    blocks: dict[tuple[str, bool], list[Direction]] = {}
    for name, p in parameters.items():
        if p.grad is not None and any(kind in name for kind in PERTURBED):
            number = re.search(r"\.\d+\.", name)
            block = (number.group() if number else name, MAGNITUDE in name)
            blocks.setdefault(block, []).append((p, p.grad.detach()))
    for p in parameters.values():
        p.grad = None
    generator, found = torch.Generator().manual_seed(seed), []
    for matrices in blocks.values():
        square = _squares(gradient for _, gradient in matrices)
        sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
        if 0.0 < square < math.inf:
            found += [(p, gradient * (sign / square)) for p, gradient in matrices]
    norm = math.sqrt(_squares(added for _, added in found))
    return [(p, added / norm) for p, added in found]


def _squares(tensors: Iterable[Tensor]) -> float:
    """The sum of squares of all entries, in fp64. It is added up on the tensors' device, and read once."""
    return float(sum(tensor.double().square().sum() for tensor in tensors))


def strength_for(
    policy: Policy,
    completions: Sequence[Completion],
    before: Tensor,
    temperature: float,
    directions: Sequence[Direction],
) -> float:
    """The norm of the perturbation that moves the trainer's log-probabilities by about MOVE.

    before: [N], the log-probabilities without it. A model whose logits are all small cannot be moved so far; the norm
    that moves it farthest is returned then. Raises UserError if that distance is less than LEAST, or if the smallest
    norm moves the model too far.
    """
    strength, low, high = 0.1, 0.0, math.inf
    farthest = 0.0
    for _ in range(ATTEMPTS):
        with perturbed_adapter(directions, strength):
            moved = distance(trainer_logp(policy, completions, temperature), before)
        if MOVE / 1.5 <= moved <= 1.5 * MOVE:
            return strength
        if moved < MOVE:
            if LEAST < moved < 1.1 * farthest:
                break  # a larger norm moves the model no farther
            low, farthest = (strength, moved) if moved > farthest else (low, farthest)
        else:
            high = strength
        aimed = strength * min(max(MOVE / max(moved, 1e-9), 0.1), 10.0)
        strength = aimed if low < aimed < high else math.sqrt(max(low, SMALLEST) * min(high, LARGEST))
    if farthest > LEAST:
        return low
    if math.isinf(high):
        raise UserError(
            "no change of the adapter moves the policy's log-probabilities, so there is nothing to train: check "
            "model.lora.targets and model.lora.alpha"
        )
    raise UserError(
        "even a tiny change of the adapter moves the policy's log-probabilities by more than a few nats, or to "
        "something that is no number: lower model.lora.alpha, or choose another model.dtype"
    )


@contextlib.contextmanager
def perturbed_adapter(directions: Sequence[Direction], strength: float) -> Iterator[None]:
    """A context within which `strength` times the directions is added to the adapter. Afterwards it is restored."""
    kept = [p.detach().clone() for p, _ in directions]
    try:
        with torch.no_grad():
            for p, added in directions:
                p.add_(added, alpha=strength)
        yield
    finally:
        with torch.no_grad():
            for (p, _), before in zip(directions, kept, strict=True):
                p.copy_(before)


def engine_logp(completions: Sequence[Completion]) -> Tensor:
    """Log-probabilities at the base temperature as the engine recorded them: [N]."""
    return torch.cat([c.base_logp for c in completions])


def distance(a: Tensor, b: Tensor) -> float:
    """Mean absolute difference of two tensors of one shape."""
    return float((a.double() - b.double()).abs().mean())
