"""The record of the tokens that are drawn, and the way to draw them inside another library's sampler.

Axes: B rows (completions being written), V vocabulary, S steps, P prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, EncodedPrompt, Request, put
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn, draw


def pad_left(prompts: Sequence[EncodedPrompt], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and attention mask, [P, L] each, padded on the left. The mask comes from lengths."""
    lengths = torch.tensor([len(p.ids) for p in prompts])
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(p.ids) for p in prompts], batch_first=True, padding_value=pad_id, padding_side="left"
    )
    mask = torch.arange(ids.shape[1])[None] >= ids.shape[1] - lengths[:, None]
    return put(ids, device), put(mask.long(), device)


def positions(mask: Tensor) -> Tensor:
    """The positions of tokens that are padded on the left, [B, L]. mask: [B, L], 1 on tokens.

    Padding has position 0 as well: a table of positions has no entry -1.
    """
    return (mask.cumsum(1) - 1).clamp(min=0)


class Transcript:
    """The tokens drawn so far and their records, in [S, B] tensors on the model's device."""

    def __init__(self, steps: int, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros((steps, rows), dtype=torch.long, device=device)
        self.records = torch.zeros((4, steps, rows), dtype=torch.float32, device=device)

    def write(self, step: Tensor, rows: Tensor, drawn: Drawn) -> None:
        """Record the tokens of `rows`, [n], at `step`: one step for all rows, [1], or [n]."""
        self.ids[step, rows] = drawn.ids
        values = (drawn.sampling_logp, drawn.base_logp, drawn.entropy, drawn.temperature)
        self.records[:, step, rows] = torch.stack(values)

    def completions(
        self, requests: Sequence[Request], lengths: Sequence[int], stopped: Sequence[bool], policy: Policy
    ) -> list[Completion]:
        """The completion of each request. lengths: [B], tokens; stopped: [B], whether the last one is a stop token."""
        ids = _rows(self.ids.T.contiguous().cpu(), lengths)
        records = self.records.transpose(1, 2).contiguous().cpu()
        sampling_logp, base_logp, entropy, temperature = (_rows(values, lengths) for values in records)
        return [
            Completion(
                prompt=request.prompt,
                sample=request.sample,
                ids=ids[b],
                text=policy.decode(ids[b].tolist()),
                truncated=not stopped[b],
                sampling_logp=sampling_logp[b],
                base_logp=base_logp[b],
                entropy=entropy[b],
                temperature=temperature[b],
            )
            for b, request in enumerate(requests)
        ]


def _rows(values: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Each row of [B, S] up to its length, in memory of its own."""
    return [row[:n].clone() for row, n in zip(values.unbind(), lengths, strict=True)]


class ForcedSampler:
    """Draws and records each token inside another library's sampler, and leaves that sampler no other token to choose.

    The library's own random numbers then have no effect, and its completions are those of every other engine.
    draws: [S, B], the random numbers. drew: called at each step with the number of rows that were drawn.
    """

    def __init__(
        self, processor: AdaptiveTemperature, draws: Tensor, drew: Callable[[int], None] = lambda rows: None
    ) -> None:
        self.processor, self.draws, self.drew = processor, draws, drew
        steps, rows = draws.shape
        self.transcript = Transcript(steps, rows, draws.device)

    def __call__(self, logits: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
        """Scores for the library's sampler, [n, V]: 0 for the token drawn, -inf for every other.

        logits: [n, V]; steps, rows: [n], the place of each row of logits in `draws`.
        """
        drawn = draw(self.processor, logits, self.draws[steps, rows])
        self.transcript.write(steps, rows, drawn)
        self.drew(rows.shape[0])
        return torch.full_like(logits, float("-inf")).scatter_(1, drawn.ids[:, None], 0.0)

    def completions(
        self, requests: Sequence[Request], written: Sequence[Sequence[int]], policy: Policy
    ) -> list[Completion]:
        """The completion of each request. written: the token ids that the library returned for each.

        Raises RuntimeError if the library returned other tokens than were drawn.
        """
        drawn = self.transcript.ids.T.cpu()
        if any(drawn[b, : len(ids)].tolist() != list(ids) for b, ids in enumerate(written)):
            raise RuntimeError("the sampler returned other tokens than were drawn")
        stopped = [len(ids) > 0 and ids[-1] in policy.stop_ids for ids in written]
        return self.transcript.completions(requests, [len(ids) for ids in written], stopped, policy)
