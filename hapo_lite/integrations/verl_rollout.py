"""HAPO's temperature (A) in the vLLM servers that verl 0.9 starts: a logits processor for vLLM's first interface.

rollout.engine_kwargs.vllm.logits_processors names it, and VLLM_USE_V2_MODEL_RUNNER=0 keeps vLLM at that interface. This
module has not been run on a cluster yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from hapo_lite.integrations.verl import SIGNAL, temperature_of
from hapo_lite.rollout.sampling import AdaptiveTemperature


class HapoTemperature(AdapterLogitsProcessor):
    """Scales the logits of the requests that came with a signal, which the base class keeps in `req_info` by row."""

    def is_argmax_invariant(self) -> bool:
        # vLLM then calls the processor after applying its own temperature, and not for greedy requests.
        return True

    def new_req_logits_processor(self, params: Any) -> AdaptiveTemperature | None:
        row = (params.extra_args or {}).get(SIGNAL)
        return None if row is None else temperature_of(row)

    def apply(self, logits: Tensor) -> Tensor:
        """Scale the logits in place. logits: [n, V], at the base temperature. All requests have the same signal."""
        if self.req_info:
            rows = torch.tensor(list(self.req_info), device=logits.device)
            temperature = next(iter(self.req_info.values())).func
            logits[rows] = temperature(None, logits[rows]).to(logits.dtype)
        return logits
