"""HAPO's temperature (A) in the vLLM servers that verl 0.9 starts, as vLLM's logits processor of the first interface.

Named in rollout.engine_kwargs.vllm.logits_processors; VLLM_USE_V2_MODEL_RUNNER=0 keeps vLLM at that interface. Not yet
run on a cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from hapo_lite.integrations.verl import SIGNAL, temperature_of


class HapoTemperature(AdapterLogitsProcessor):
    """vLLM tells the base class which requests are at which rows; `req_info` has those that came with a signal."""

    def is_argmax_invariant(self) -> bool:
        return True  # so that vLLM calls it once its own temperature is in the logits, and not for greedy requests

    def new_req_logits_processor(self, params):
        row = (params.extra_args or {}).get(SIGNAL)
        return None if row is None else temperature_of(row)

    def apply(self, logits: Tensor) -> Tensor:
        """logits: [n, V], at the base temperature, changed in place. All requests of an iteration have one signal."""
        if self.req_info:
            rows = torch.tensor(list(self.req_info), device=logits.device)
            temperature = next(iter(self.req_info.values())).func
            logits[rows] = temperature(None, logits[rows]).to(logits.dtype)
        return logits
