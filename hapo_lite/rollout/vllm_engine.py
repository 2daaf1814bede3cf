"""Sampling through vLLM in this process. vLLM holds a second base, and loads the policy's adapter before every rollout.

Nothing is merged into vLLM's base. While the policy trains vLLM sleeps: its cache is freed and its weights wait in main
memory. Axes: B requests.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from hapo_lite.errors import UserError
from hapo_lite.model.adapter import save_adapter
from hapo_lite.model.policy import Policy
from hapo_lite.records import Completion, Request
from hapo_lite.rollout.batched_engine import WAVE, BatchedEngine
from hapo_lite.rollout.engine import EngineSettings
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import ForcedSampler
from hapo_lite.rollout.vllm_processor import NUMBER, SharedSampler, batch_processor, slot_processor
from hapo_lite.runs.interrupt import signals_held

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The adapter ranks that vLLM can be started for."""
ADAPTER = 1
"""The adapter's number in vLLM. It is always the same, so that each new adapter replaces the last."""


class VllmEngine(BatchedEngine):
    """Samples with vLLM. llm: a `vllm.LLM` whose logits processor was made with `shared`."""

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int, llm: Any, shared: SharedSampler) -> None:
        super().__init__(policy, batch_size, max_new_tokens)
        self.rows = batch_size
        self.llm = llm
        self.shared = shared
        self.adapter: Any = None
        self.sleep_level = 1 if policy.device.type == "cuda" else 0  # on a CPU only the queue can sleep
        self.llm.sleep(self.sleep_level)

    @classmethod
    def make(cls, settings: EngineSettings, policy: Policy) -> Self:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(
                "rollout.engine = vllm works in one process: start without accelerate launch, or use "
                "rollout.engine=transformers"
            )
        # The engine core runs in this process, where the logits processor and the engine share one SharedSampler.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        shared = SharedSampler()
        try:
            arguments = vllm.EngineArgs(**engine_arguments(settings, policy))
            second_runner = arguments.create_engine_config().use_v2_model_runner
            arguments.logits_processors = [slot_processor(shared) if second_runner else batch_processor(shared)]
            llm = vllm.LLM.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"rollout.engine = vllm does not start ({reason}): if memory is short change rollout.engine_memory or "
                "lower rollout.batch_size, else use rollout.engine=transformers"
            ) from error
        return cls(policy, settings.rollout.batch_size, settings.max_new_tokens, llm, shared)

    @property
    def part_size(self) -> int:
        # vLLM keeps the number of rows that it was started with, so fewer run at once only if fewer are queued.
        return self.batch_size * (WAVE if self.batch_size == self.rows else 1)

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        device = self.policy.device
        forced = ForcedSampler(processor, draws, self.writing.drew)
        self.shared.forced = forced
        self.shared.prompt_lengths = torch.tensor([len(r.prompt.ids) for r in requests], device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()  # vLLM computes in another stream
        with torch.no_grad():
            written = self._generate([list(r.prompt.ids) for r in requests], draws.shape[0])
        return forced.completions(requests, written, self.policy)

    def _generate(self, prompts: list[list[int]], limit: int) -> list[list[int]]:
        """The token ids written after each prompt. A signal is held until a step has ended, as it would break vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm = self.llm.llm_engine
        written: dict[int, list[int]] = {}
        try:
            for i, ids in enumerate(prompts):
                params = SamplingParams(
                    temperature=0.0,  # greedy: the processor has drawn, and leaves one token
                    max_tokens=limit,
                    ignore_eos=True,  # the tokenizer's only; stop_token_ids has all of the policy's
                    stop_token_ids=list(self.policy.stop_ids),
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                    extra_args={NUMBER: i},
                )
                llm.add_request(str(i), {"prompt_token_ids": ids}, params, lora_request=self.adapter)
            while llm.has_unfinished_requests():
                with signals_held():
                    outputs = llm.step()
                ended = {int(o.request_id): list(o.outputs[0].token_ids) for o in outputs if o.finished}
                written |= ended
                self.writing.finished(len(ended))
        finally:
            llm.abort_request([str(i) for i in range(len(prompts)) if i not in written])
        return [written[i] for i in range(len(prompts))]

    def _adapter(self) -> Any:
        """Replace vLLM's adapter by the policy's. Returns the `LoRARequest`, or None if the policy's is disabled."""
        from vllm.lora.request import LoRARequest

        # The cached prompts were computed with the last adapter, and are found by the adapter's name.
        self.llm.reset_prefix_cache()
        if not self.policy.model.get_model_status().enabled:
            return None
        with tempfile.TemporaryDirectory(prefix="hapo_adapter_") as folder:
            save_adapter(self.policy, Path(folder))
            self.llm.llm_engine.add_lora(LoRARequest("policy", ADAPTER, folder, load_inplace=True))
            return LoRARequest("policy", ADAPTER, folder)

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """A context within which vLLM is awake, with its cache and weights on the GPU and the current adapter."""
        self.llm.wake_up()
        try:
            self.adapter = self._adapter()
            yield
        finally:
            self.shared.forced = None
            self.llm.sleep(self.sleep_level)


def engine_arguments(settings: EngineSettings, policy: Policy) -> dict[str, Any]:
    """The arguments that vLLM is started with.

    Raises UserError if the adapter's rank is too large or a 4-bit base is asked for in fp32, and ImportError if the
    4-bit plug-in is missing.
    """
    base, rank = policy.base, settings.model.lora.rank
    trust = settings.model.trust_remote_code  # loading the policy has checked whose code that is
    room = next((r for r in RANKS if r >= rank), None)
    if room is None:
        raise UserError(f"model.lora.rank = {rank} is more than vLLM has room for: lower it to {RANKS[-1]}")
    arguments: dict[str, Any] = {
        "model": base.name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "trust_remote_code": trust,
        "dtype": str(base.dtype).removeprefix("torch."),
        "seed": settings.seed,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        "max_num_seqs": settings.rollout.batch_size,
        "max_model_len": min(policy.context, settings.max_prompt_tokens + settings.max_new_tokens),
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if settings.model.quantization == "nf4":
        if base.dtype == torch.float32:
            raise UserError("rollout.engine = vllm has no 4-bit base in fp32: set model.dtype=bf16 (or fp16)")
        if importlib.util.find_spec("vllm_bnb_plugin") is None:
            raise ImportError("vllm-bnb-plugin, which quantises the base to 4 bits, is missing")
        # The plug-in quantises the weights as they are loaded, to NF4 with double quantisation like the policy's.
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    if policy.device.type == "cuda":
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": settings.rollout.engine_memory}
    return arguments
