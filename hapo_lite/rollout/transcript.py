"""Drawing tokens, and the record of what was drawn: the same for every engine that sees the logits.

Axes: B rows (completions being written), V vocabulary, S steps, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, EncodedPrompt
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature, inverse_cdf, uniforms


@dataclass(frozen=True)
class Drawn:
    """One token a row, [B] each; meanings as in `Completion`."""

    ids: Tensor
    sampling_logp: Tensor
    base_logp: Tensor
    entropy: Tensor
    temperature: Tensor


def draw(processor: AdaptiveTemperature, logits: Tensor, uniform: Tensor) -> Drawn:
    """logits: [B, V] as the model gives them; uniform: [B]."""
    scores = processor(None, logits)
    ids = inverse_cdf(scores, uniform)
    index = ids[:, None]
    return Drawn(
        ids,
        sampling_logp=scores.gather(1, index).squeeze(1) - scores.logsumexp(dim=-1),
        base_logp=logits.float().gather(1, index).squeeze(1) / processor.base - processor.log_normalizer,
        entropy=processor.entropy,
        temperature=processor.temperature,
    )


def draws_of(requests: Sequence[Request], seed: int, stage: int, iteration: int, count: int) -> Tensor:
    """The random numbers of each request's completion: [count, B], fp64."""
    rows = [uniforms(seed, stage, iteration, r.prompt.index, r.sample, count) for r in requests]
    return torch.stack(rows, dim=1)


def pad_left(prompts: Sequence[EncodedPrompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and attention mask, [P, L] each, padded on the left; the mask comes from lengths."""
    lengths = torch.tensor([len(p.ids) for p in prompts])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(p.ids) for p in prompts], batch_first=True, padding_value=pad_id, padding_side="left"
    )
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - lengths[:, None]
    return ids.to(device), mask.long().to(device)


class Transcript:
    """What has been drawn, as it is drawn: [S, B] tensors on the model's device."""

    def __init__(self, steps: int, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros((steps, rows), dtype=torch.long, device=device)
        self.records = torch.zeros((4, steps, rows), dtype=torch.float32, device=device)

    def write(self, step: int | Tensor, rows: Tensor, drawn: Drawn, only: Tensor | slice = slice(None)) -> None:
        """Note the tokens of `rows` [n] at `step`, one for all or [n]. only: which rows of `drawn` they are."""
        self.ids[step, rows] = drawn.ids[only]
        values = (drawn.sampling_logp, drawn.base_logp, drawn.entropy, drawn.temperature)
        for record, value in zip(self.records, values, strict=True):
            record[step, rows] = value[only]

    def completions(
        self, requests: Sequence[Request], lengths: Sequence[int], stopped: Sequence[bool], policy: Policy
    ) -> list[Completion]:
        ids = self.ids.T.contiguous().cpu()
        sampling_logp, base_logp, entropy, temperature = self.records.transpose(1, 2).contiguous().cpu()
        texts = policy.tokenizer.batch_decode(
            [ids[b, :n].tolist() for b, n in enumerate(lengths)], skip_special_tokens=True
        )
        return [
            Completion(
                prompt=request.prompt,
                sample=request.sample,
                ids=ids[b, :n].clone(),
                text=texts[b],
                truncated=not stopped[b],
                sampling_logp=sampling_logp[b, :n].clone(),
                base_logp=base_logp[b, :n].clone(),
                entropy=entropy[b, :n].clone(),
                temperature=temperature[b, :n].clone(),
            )
            for b, (request, n) in enumerate(zip(requests, lengths, strict=True))
        ]


class Scribe:
    """Draws and records tokens within a sampler of somebody else's, and leaves it no other token to choose.

    So that sampler's own random numbers play no part, and its completions are those of every other engine. draws:
    [S, B]. drew: told at each call for how many rows.
    """

    def __init__(
        self, processor: AdaptiveTemperature, draws: Tensor, drew: Callable[[int], None] = lambda rows: None
    ) -> None:
        self.processor, self.draws, self.drew = processor, draws, drew
        self.transcript = Transcript(*draws.shape, draws.device)

    def __call__(self, logits: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
        """logits: [n, V]; steps, rows: [n], where each stands in `draws`. Scores: 0 for the token drawn, else -inf."""
        drawn = draw(self.processor, logits, self.draws[steps, rows])
        self.transcript.write(steps, rows, drawn)
        self.drew(rows.shape[0])
        return torch.full_like(logits, float("-inf")).scatter_(1, drawn.ids[:, None], 0.0)

    def completions(
        self, requests: Sequence[Request], written: Sequence[Sequence[int]], policy: Policy
    ) -> list[Completion]:
        """written: what the sampler returned for each request. Raises RuntimeError if that was not drawn."""
        drawn = self.transcript.ids.T.cpu()
        if any(drawn[b, : len(ids)].tolist() != list(ids) for b, ids in enumerate(written)):
            raise RuntimeError("the sampler returned other tokens than were drawn")
        stopped = [len(ids) > 0 and ids[-1] in policy.stop_ids for ids in written]
        return self.transcript.completions(requests, [len(ids) for ids in written], stopped, policy)
