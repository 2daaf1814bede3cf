"""Decoding steps recorded once for each pair of shapes and replayed, so that the host launches nothing but a graph.

A step reads and writes tensors whose memory stays where it is for a whole batch: cache, mask, rows, random numbers,
transcript. Its constants (the adaptive temperature's statistics among them) do not change within a batch either.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

Step = Callable[[], None]
Recorder = Callable[[Step], Step]
"""Records a step without running it, and gives what replays it."""

MEASURED = False
"""Whether replayed graphs have been measured on a card. rollout.cuda_graphs = auto uses none before that."""


class Graphs:
    """Runs steps. With a recorder, a step whose shapes have been seen once is recorded and replayed from then on.

    The first step of any shapes runs as it is: libraries allocate their work space in it.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Step] = {}

    def run(self, shapes: Hashable, step: Step) -> None:
        """shapes: what distinguishes this step from those that need a graph of their own."""
        if self._record is None or shapes not in self._seen:
            self._seen.add(shapes)
            step()
            return
        if shapes not in self._replays:
            self._replays[shapes] = self._record(step)
        self._replays[shapes]()


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        return graph.replay


def recorder_for(setting: str, device: torch.device) -> Recorder | None:
    """What records the steps of a batch on `device`; None: nothing.

    setting: rollout.cuda_graphs, or "on", which no recipe takes: recorded before it has been measured, to measure it.
    """
    wanted = setting == "on" or (setting == "auto" and MEASURED)
    return CudaRecorder() if wanted and device.type == "cuda" else None
