"""HAPO's temperature within vLLM: its custom logits processor, in both of the interfaces that vLLM has.

Each only finds out which token of which request a row of logits is; the rest is the scribe's, as in every engine. vLLM
is imported by the two functions that make a processor and by nothing else here. Axes: n rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hapo_lite.rollout.transcript import Scribe

NUMBER = "hapo_request"
"""The key in a request's `SamplingParams.extra_args` under which it has its number among those being written."""
NOBODY = -1
"""The number of a row that is nobody's."""


class Desk:
    """What engine and processor share, in one process: who writes now, and how long each request's prompt is, [B]."""

    def __init__(self) -> None:
        self.scribe: Scribe | None = None
        self.prompt_lengths = torch.empty(0, dtype=torch.long)

    def write(self, logits: Tensor, requests: Tensor, steps: Tensor) -> Tensor:
        """Let the scribe choose. logits: [n, V], changed in place; requests, steps: [n].

        Left alone are rows of nobody, and those before or beyond a completion: vLLM computes them for prompts that it
        has read in part and for requests that are about to end, and throws them away.
        """
        if self.scribe is None:
            return logits
        mine = ((requests != NOBODY) & (steps >= 0) & (steps < self.scribe.draws.shape[0])).nonzero().squeeze(1)
        if mine.shape[0]:
            logits[mine] = self.scribe(logits[mine], steps[mine], requests[mine])
        return logits


class BatchRows:
    """The first interface (V1): a row is a request's place in the batch, which changes as requests come and go."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.held: dict[int, tuple[int, Sequence[int]]] = {}

    def update(self, update: Any) -> None:
        """update: vLLM's `BatchUpdate`, or None for no change; first what was removed, then added, then moved."""
        if update is None:
            return
        for row in update.removed:
            self.held.pop(row, None)
        for row, params, _, written in update.added:
            # `written` is the request's own list, which grows as tokens are sampled.
            self.held[row] = (number_of(params), written)
        for a, b, direction in update.moved:
            first, second = self.held.pop(a, None), self.held.pop(b, None)
            if first is not None:
                self.held[b] = first
            if second is not None and direction.name == "SWAP":
                self.held[a] = second

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [n, V], row i being the batch's place i."""
        rows = [self.held.get(row, (NOBODY, ())) for row in range(logits.shape[0])]
        requests = torch.tensor([number for number, _ in rows], device=logits.device)
        steps = torch.tensor([len(written) for _, written in rows], device=logits.device)
        return self.desk.write(logits, requests, steps)


class SlotRows:
    """The second interface (V2): a request has a slot while it is being written, and every row names its slot."""

    def __init__(self, desk: Desk, slots: int, device: torch.device) -> None:
        self.desk = desk
        self.staged = [NOBODY] * slots
        self.numbers = torch.tensor(self.staged, device=device)
        self.changed = False

    def add(self, slot: int, params: Any) -> bool:
        """A slot is used again and again: its last request is forgotten here. Returns whether the request is ours."""
        self.staged[slot] = number_of(params)
        self.changed = True
        return self.staged[slot] != NOBODY

    def flush(self) -> None:
        """Once before each step: what was added goes to the device."""
        if self.changed:
            self.numbers = torch.tensor(self.staged, device=self.numbers.device)
            self.changed = False

    def apply(self, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """logits: [n, V]; slots: [n]; positions: [n], of the token that each row has read last, prompt included."""
        requests = self.numbers[slots]
        if self.desk.scribe is None:
            return logits
        # Nobody's row reads the last prompt's length, and is left alone by its number.
        steps = positions + 1 - self.desk.prompt_lengths[requests]
        return self.desk.write(logits, requests, steps)


def number_of(params: Any) -> int:
    return (params.extra_args or {}).get(NUMBER, NOBODY)


def batch_processor(desk: Desk) -> type:
    """The class to register where vLLM's model runner is the first. It asks for one of its own base class."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class BatchProcessor(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory):
            self.rows = BatchRows(desk)

        def is_argmax_invariant(self):
            return False  # it is what chooses, for greedy requests too

        def update_state(self, batch_update):
            self.rows.update(batch_update)

        def apply(self, logits):
            return self.rows.apply(logits)

    return BatchProcessor


def slot_processor(desk: Desk) -> type:
    """The class to register where vLLM's model runner is the second, its default, which refuses the first's."""
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

    class SlotProcessor(LogitsProcessor):
        def __init__(self, vllm_config, req_states):
            self.rows = SlotRows(desk, req_states.max_num_reqs, req_states.device)

        def add_request(self, req_idx, sampling_params):
            return self.rows.add(req_idx, sampling_params)

        def apply_staged_writes(self):
            self.rows.flush()

        def apply(self, logits, ctx):
            return self.rows.apply(logits, ctx.expanded_idx_mapping, ctx.pos)

    return SlotProcessor
