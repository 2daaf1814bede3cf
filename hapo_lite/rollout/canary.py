"""Before training: does the engine sample from the policy that is trained, adapter included?

An engine with a copy of the weights that is out of date, or that left the adapter out, trains to nothing and raises no
error. So the adapter is perturbed, and the engine's log-probabilities have to follow the trainer's.

How far two right computations lie apart belongs to the model and its dtype. So the trainer is also compared with
itself, as it scores the same tokens one by one through a cache, which is how a sampler computes them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import DynamicCache

from hapo_lite.errors import UserError
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion, EncodedPrompt, Sequences, pad
from hapo_lite.rollout.engine import CANARY, Engine, Request
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import pad_left

PROMPTS, TOKENS, OFFERED = 4, 16, 32
"""What is sampled, twice: so many completions of at most so many tokens, of the shortest prompts among the first."""
MOVE = 1.0
"""How far the perturbation moves the trainer's log-probabilities, nats a token: far above any rounding, and far from
where the model's own answers break down."""
LEAST = 0.02
"""A model that cannot be moved as far as that, nats a token, has nothing to train."""
SMALLEST, LARGEST, ATTEMPTS = 1e-3, 1e3, 12
"""Norms of the perturbation that are tried, and how many of them."""
SAME, ALIKE, FOREIGN = 0.25, 1.0, 1.6
"""In parts of the floor. An engine that at rest is as near as SAME to the trainer's own steps computes as they do, and
is then held to ALIKE from them. Any other is held to FOREIGN from the trainer."""
SLACK, SHARE = 1e-3, 0.005
"""What is allowed beside it, for dtypes that hardly round: nats at rest, and the part of a perturbation's move."""


@dataclass(frozen=True)
class Distance:
    """Mean distances of log-probabilities over the sampled tokens, nats.

    engine: to the trainer. steps: to the trainer's own token-by-token pass. floor: of that pass to the trainer.
    rounded: the same with logits that are rounded to the compute dtype, as a head without fp32 sums makes them.
    """

    engine: float
    steps: float
    floor: float
    rounded: float

    def share(self, alike: bool, slack: float) -> float:
        """The distance in parts of what is allowed. alike: as in `Canary`; slack: nats allowed in any dtype."""
        if alike:
            return self.steps / (ALIKE * self.floor + slack)
        return self.engine / (FOREIGN * max(self.floor, self.rounded) + slack)


@dataclass(frozen=True)
class Canary:
    """at_rest, perturbed: with the adapter as it is, and perturbed.

    moved: by how much the perturbation changed the trainer's log-probabilities of the tokens that were sampled under
    it, nats a token. followed: the part of that change that the engine made too; 1 for a right one.
    """

    at_rest: Distance
    perturbed: Distance
    moved: float
    followed: float

    @property
    def alike(self) -> bool:
        """Whether the engine rounds as the trainer's own steps do, told by how near to them it is at rest."""
        return self.at_rest.steps <= SAME * self.at_rest.floor

    @property
    def shares(self) -> tuple[float, float]:
        """The distance at rest and perturbed, each in parts of what is allowed."""
        return self.at_rest.share(self.alike, SLACK), self.perturbed.share(self.alike, SHARE * self.moved)

    @property
    def right(self) -> bool:
        # A share that is not a number is no agreement.
        return all(share <= 1.0 for share in self.shares)

    def __str__(self) -> str:
        return (
            f"{self.at_rest.engine:.1e} nats from the trainer's, where rounding alone makes {self.at_rest.floor:.1e}; "
            f"with an adapter perturbed by {self.moved:.2g} nats {self.perturbed.engine:.1e}, where rounding makes "
            f"{self.perturbed.floor:.1e}, and they follow {self.followed:.1%} of the change"
        )

    def meaning(self) -> str:
        """What an engine that is not right does, as far as the numbers tell."""
        if not self.shares[0] <= 1.0:
            return "its base, or its adapter, is another one even before the adapter is perturbed"
        return (
            "the adapter that it samples with is not the current one: it is left out, a step old, at another scale "
            "(model.lora.alpha / model.lora.rank), or incomplete"
        )


def check_engine(
    engine: Engine,
    policy: Policy,
    prompts: Sequence[EncodedPrompt | None],
    recipe: Recipe,
    accelerator: Accelerator,
) -> Canary:
    """Sample a few tokens with the adapter as it is and perturbed, and compare with the trainer.

    The adapter is the same afterwards, to the last bit. Raises UserError, with the numbers, if they are too far apart;
    in every process, if they are in one.
    """
    found = compare(engine, policy, prompts, recipe)
    wrong = torch.tensor(float(not found.right), device=accelerator.device)
    if accelerator.reduce(wrong, "sum") > 0:
        if found.right:
            raise UserError("another process found that its engine does not sample from the policy that is trained")
        raise UserError(
            f"rollout.engine = {recipe.rollout.engine} does not sample from the policy that is trained: its "
            f"log-probabilities are {found}; {found.meaning()}; {_advice(recipe.rollout.engine)}"
        )
    return found


def compare(engine: Engine, policy: Policy, prompts: Sequence[EncodedPrompt | None], recipe: Recipe) -> Canary:
    """What `check_engine` judges. Raises UserError if no change of the adapter moves the policy."""
    settings = recipe.rollout
    offered = (prompt for prompt in itertools.islice(prompts, OFFERED) if prompt is not None)
    some = sorted(offered, key=lambda prompt: len(prompt.ids))[:PROMPTS]
    requests = [Request(prompt, sample) for sample in range(PROMPTS) for prompt in some][:PROMPTS]

    def sampled() -> list[Completion]:
        processor = AdaptiveTemperature(None, settings.temperature, top_p=settings.top_p, top_k=settings.top_k)
        return engine.sample(requests, processor, recipe.seed, CANARY, 0, limit=TOKENS)

    with policy.unpacked(exact=True):
        before = sampled()
        resting = trainer_logp(policy, before, settings.temperature)
        at_rest = measure(policy, before, resting, settings.temperature)
        directions = blockwise_directions(policy, before, settings.temperature, recipe.seed)
        strength = strength_for(policy, before, resting, settings.temperature, directions)
        with perturbed_adapter(directions, strength):
            after = sampled()
            moved_to = trainer_logp(policy, after, settings.temperature)
            perturbed = measure(policy, after, moved_to, settings.temperature)
        moved_from = trainer_logp(policy, after, settings.temperature)
    change = (moved_to - moved_from).double()
    followed = ((engine_logp(after) - moved_from).double() * change).sum() / change.square().sum()
    return Canary(at_rest, perturbed, float(change.abs().mean()), float(followed))


def _advice(engine: str) -> str:
    if engine == "transformers":
        return "this engine is the reference, so please report this sentence with the model's name"
    return "use rollout.engine=transformers, or other versions of the engine's packages"


def measure(policy: Policy, completions: Sequence[Completion], trainer: Tensor, temperature: float) -> Distance:
    """Engine, trainer [N] and the trainer's own steps on the same tokens, with the adapter as it is now."""
    own = engine_logp(completions)
    steps, rounded = stepwise_logp(policy, completions, temperature)
    return Distance(distance(own, trainer), distance(own, steps), distance(steps, trainer), distance(rounded, trainer))


@torch.no_grad()
def trainer_logp(policy: Policy, completions: Sequence[Completion], temperature: float) -> Tensor:
    """Log-probabilities as training scores them, one completion after the other: [N], on the CPU."""
    batch = Sequences.of(completions, policy.device)
    return policy.completion_logprobs(batch, temperature)[0][batch.mask].cpu()


@torch.no_grad()
def stepwise_logp(policy: Policy, completions: Sequence[Completion], temperature: float) -> tuple[Tensor, Tensor]:
    """The same, but each token through a cache after those before it, as a sampler computes it; and again with logits
    that are rounded to the policy's dtype.
    """
    states = torch.cat(_row_states(policy, completions) if policy.steps else _lone_states(policy, completions))
    targets = torch.cat([c.ids for c in completions]).to(policy.device)
    exact, _ = policy.token_logprobs(states, targets, temperature)
    return exact.cpu(), policy.rounded_logprobs(states, targets, temperature).cpu()


def _row_states(policy: Policy, completions: Sequence[Completion]) -> list[Tensor]:
    """What the head reads for each token of each completion, [T, D], computed token by token."""
    decoder, config = policy.model.get_base_model().get_decoder(), policy.model.get_base_model().config
    ids, mask = pad_left([c.prompt for c in completions], policy.tokenizer.pad_token_id, policy.device)
    tokens, found = pad([c.ids for c in completions], policy.device), []
    cache = DynamicCache(config=config.get_text_config())
    # The precision is the trainer's, whatever the sampler's may be.
    with policy.sampling(), policy.autocast():
        for step in range(tokens.shape[1]):
            out = decoder(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
            found.append(out.last_hidden_state[:, -1])
            ids, mask = tokens[:, step : step + 1], torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return [row[: c.length] for row, c in zip(torch.stack(found, dim=1), completions, strict=True)]


def _lone_states(policy: Policy, completions: Sequence[Completion]) -> list[Tensor]:
    """The same for a model whose decoder cannot be called step by step: each completion alone, another shape too."""
    found = []
    for c in completions:
        ids = torch.cat([torch.tensor(c.prompt.ids), c.ids])[None].to(policy.device)
        with policy.autocast():
            found.append(policy.hidden_states(ids)[0, len(c.prompt.ids) - 1 : -1])
    return found


Direction = tuple[nn.Parameter, Tensor]
"""A matrix of the adapter, and what a perturbation of strength 1 adds to it."""


def blockwise_directions(
    policy: Policy, completions: Sequence[Completion], temperature: float, seed: int
) -> list[Direction]:
    """The gradient of the tokens' log-probability with respect to every B matrix, with a seeded sign for each block of
    layers, and scaled so that every block changes that log-probability by as much.

    Along the gradient a small change of the weights moves log-probabilities evenly. Noise on all weights moves them
    hardly at all until it destroys the model. The signs keep the blocks' effects on a token apart, so that a block that
    is missing shows. Raises UserError where nothing has a gradient.
    """
    batch = Sequences.of(completions, policy.device)
    logp, _ = policy.completion_logprobs(batch, temperature)
    parameters = policy.trainable()
    logp[batch.mask].sum().backward()
    blocks: dict[str, list[Direction]] = {}
    for name, p in parameters.items():
        if p.grad is not None and ("lora_B" in name or "lora_embedding_B" in name):
            number = re.search(r"\.\d+\.", name)
            blocks.setdefault(number.group() if number else name, []).append((p, p.grad.detach()))
    for p in parameters.values():
        p.grad = None
    generator, found = torch.Generator().manual_seed(seed), []
    for matrices in blocks.values():
        square = sum(float(gradient.double().square().sum()) for _, gradient in matrices)
        sign = 1.0 if torch.rand((), generator=generator) < 0.5 else -1.0
        if 0.0 < square < math.inf:
            found += [(p, gradient * (sign / square)) for p, gradient in matrices]
    norm = math.sqrt(sum(float(added.double().square().sum()) for _, added in found))
    return [(p, added / norm) for p, added in found]


def strength_for(
    policy: Policy,
    completions: Sequence[Completion],
    before: Tensor,
    temperature: float,
    directions: Sequence[Direction],
) -> float:
    """The norm of the perturbation that moves the trainer's log-probabilities, `before` [N], by about MOVE.

    A model whose logits are all small cannot be moved so far: then the norm that moves it farthest. Raises UserError
    where that is less than LEAST, and where the smallest norm moves it too far.
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
                break  # it has come to its bound
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
    """The adapter with `strength` times the directions added; afterwards its matrices are what they were."""
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
    return torch.cat([c.base_logp for c in completions])


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().mean())
