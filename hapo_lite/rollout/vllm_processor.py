"""HAPO's temperature within vLLM: a custom logits processor for each of the two interfaces that vLLM has.

A processor finds out which token of which request each row of logits is for; the `ForcedSampler` does the rest, as in
every engine. Only the two functions that make a processor import vLLM. Axes: n rows of a step, B requests, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hapo_lite.rollout.transcript import ForcedSampler

NUMBER = "hapo_request"
"""The key in `SamplingParams.extra_args` for a request's number, its place among the requests that are sampled."""
NOBODY = -1
"""The number of a row that belongs to none of the requests."""


class SharedSampler:
    """What engine and processor share within one process.

    forced: draws the tokens; None while nothing is sampled. prompt_lengths: of each request, [B].
    """

    def __init__(self) -> None:
        self.forced: ForcedSampler | None = None
        self.prompt_lengths = torch.empty(0, dtype=torch.long)

    def write(self, logits: Tensor, requests: Tensor, steps: Tensor) -> Tensor:
        """Draw a token for each row. logits: [n, V], changed in place; requests, steps: [n].

        Rows of no request stay as they are, and so do rows before or beyond a completion. vLLM computes those for
        prompts that it has read in part and for requests that are about to end, and discards their tokens.
        """
        if self.forced is None:
            return logits
        wanted = (requests != NOBODY) & (steps >= 0) & (steps < self.forced.draws.shape[0])
        rows = wanted.nonzero().squeeze(1)
        if rows.shape[0]:
            logits[rows] = self.forced(logits[rows], steps[rows], requests[rows])
        return logits


class BatchRows:
    """The first interface (V1): a row is a request's place in the batch, and places change as requests come and go.

    held: by place, the request's number and the ids that it has written.
    """

    def __init__(self, shared: SharedSampler) -> None:
        self.shared = shared
        self.held: dict[int, tuple[int, Sequence[int]]] = {}

    def update(self, update: Any) -> None:
        """Follow the batch. update: vLLM's `BatchUpdate`, whose removals come first, then additions, then moves."""
        if update is None:
            return
        for row in update.removed:
            self.held.pop(row, None)
        for row, params, _, written in update.added:
            # `written` is vLLM's list, which grows as tokens are sampled.
            self.held[row] = (number_of(params), written)
        for a, b, direction in update.moved:
            first, second = self.held.pop(a, None), self.held.pop(b, None)
            if first is not None:
                self.held[b] = first
            if second is not None and direction.name == "SWAP":
                self.held[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        """Draw a token for each row. logits: [n, V], changed in place; row i is place i of the batch."""
        rows = [self.held.get(row, (NOBODY, ())) for row in range(logits.shape[0])]
        requests = torch.tensor([number for number, _ in rows], device=logits.device)
        steps = torch.tensor([len(written) for _, written in rows], device=logits.device)
        return self.shared.write(logits, requests, steps)


class SlotRows:
    """The second interface (V2): a request keeps one slot while it is written, and every row comes with its slot.

    slots: their number. staged, numbers: [slots], the number of each slot's request, on the CPU and on the device.
    """

    def __init__(self, shared: SharedSampler, slots: int, device: torch.device) -> None:
        self.shared = shared
        self.staged = [NOBODY] * slots
        self.numbers = torch.tensor(self.staged, device=device)
        self.changed = False

    def add(self, slot: int, params: Any) -> bool:
        """Put a request into a slot, in place of the slot's last. Returns whether the request has a number."""
        self.staged[slot] = number_of(params)
        self.changed = True
        return self.staged[slot] != NOBODY

    def flush(self) -> None:
        """Copy the numbers to the device if any has changed; vLLM calls this before each step."""
        if self.changed:
            self.numbers = torch.tensor(self.staged, device=self.numbers.device)
            self.changed = False

    def apply(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Draw a token for each row. logits: [n, V], changed in place; slots: [n].

        positions: [n], of the last token that each row has read, counted from the prompt's first.
        """
        if self.shared.forced is None:
            return logits
        requests = self.numbers[slots]
        # A row of no request takes the length of the last prompt; `write` skips it by its number.
        steps = positions + 1 - self.shared.prompt_lengths[requests]
        return self.shared.write(logits, requests, steps)


def number_of(params: Any) -> int:
    """A request's number by its vLLM `SamplingParams`; NOBODY if they hold none."""
    return (params.extra_args or {}).get(NUMBER, NOBODY)


def batch_processor(shared: SharedSampler) -> type:
    """The class to register with vLLM's first model runner, which accepts subclasses of one class of its own."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class BatchProcessor(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory):
            self.rows = BatchRows(shared)

        def is_argmax_invariant(self):
            return False  # it chooses the token, of greedy requests too

        def update_state(self, batch_update):
            self.rows.update(batch_update)

        def apply(self, logits):
            return self.rows.apply(logits)

    return BatchProcessor


def slot_processor(shared: SharedSampler) -> type:
    """The class to register with vLLM's second model runner, its default, which refuses the first runner's classes."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class SlotProcessor(LogitsProcessor):
        def __init__(self, vllm_config, req_states):
            self.rows = SlotRows(shared, req_states.max_num_reqs, req_states.device)

        def add_request(self, req_idx, sampling_params):
            return self.rows.add(req_idx, sampling_params)

        def apply_staged_writes(self):
            self.rows.flush()

        def apply(self, logits, ctx):
            return self.rows.apply(logits, ctx.expanded_idx_mapping, ctx.pos)

    return SlotProcessor
