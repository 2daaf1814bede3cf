"""Sampling through vLLM, in this process: a base of its own, on which the policy's adapter is put before every rollout.

Only the adapter travels; nothing is ever merged into the base. While the policy trains vLLM sleeps: its cache is gone
and its weights are in the computer's memory. Axes: B requests.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hapo_lite.errors import UserError
from hapo_lite.model.adapter import save_adapter
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import Recipe
from hapo_lite.records import Completion
from hapo_lite.rollout.batched_engine import WAVE, BatchedEngine
from hapo_lite.rollout.engine import Request
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transcript import Scribe
from hapo_lite.rollout.vllm_processor import NUMBER, Desk, batch_processor, slot_processor
from hapo_lite.runs.interrupt import signals_held

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of an adapter that vLLM makes room for."""
ADAPTER = 1
"""The adapter's number in vLLM; always the same, so that a new one takes the place of the last."""


class VllmEngine(BatchedEngine):
    """Samples with vLLM. llm: a `vllm.LLM` whose logits processor writes at `desk`. batch_size: rows at once."""

    def __init__(self, policy: Policy, batch_size: int, max_new_tokens: int, llm: Any, desk: Desk) -> None:
        super().__init__(policy, batch_size, max_new_tokens)
        self.rows, self.llm, self.desk, self.adapter = batch_size, llm, desk, None
        self.level = 1 if policy.device.type == "cuda" else 0  # on a CPU only the queue can be put to sleep
        self.llm.sleep(self.level)

    @classmethod
    def make(cls, recipe: Recipe, policy: Policy, max_new_tokens: int) -> VllmEngine:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError(
                "rollout.engine = vllm works in one process: start without accelerate launch, or use "
                "rollout.engine=transformers"
            )
        # The engine core runs in this process, where the logits processor and the engine share the desk.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm

        desk = Desk()
        try:
            arguments = vllm.EngineArgs(**engine_arguments(recipe, policy, max_new_tokens))
            second = arguments.create_engine_config().use_v2_model_runner
            arguments.logits_processors = [slot_processor(desk) if second else batch_processor(desk)]
            llm = vllm.LLM.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(
                f"rollout.engine = vllm does not start ({reason}): if memory is short change rollout.engine_memory or "
                "lower rollout.batch_size, else use rollout.engine=transformers"
            ) from error
        return cls(policy, recipe.rollout.batch_size, max_new_tokens, llm, desk)

    @property
    def part_size(self) -> int:
        # vLLM keeps the rows that it was started with: fewer run at once only if fewer are queued.
        return self.batch_size * (WAVE if self.batch_size == self.rows else 1)

    def sample(self, *arguments: Any, **options: Any) -> list[Completion]:
        """As `Engine.sample` says."""
        with self._awake():
            self.adapter = self._adapter()
            return super().sample(*arguments, **options)

    def _sample_part(
        self, requests: Sequence[Request], processor: AdaptiveTemperature, draws: Tensor
    ) -> list[Completion]:
        device, scribe = self.policy.device, Scribe(processor, draws, self.writing.drew)
        self.desk.scribe = scribe
        self.desk.prompt_lengths = torch.tensor([len(r.prompt.ids) for r in requests], device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()  # vLLM computes in a stream of its own
        with torch.no_grad():
            written = self._generate([list(r.prompt.ids) for r in requests], draws.shape[0])
        return scribe.completions(requests, written, self.policy)

    def _generate(self, prompts: list[list[int]], limit: int) -> list[list[int]]:
        """What was written after each prompt. A signal waits for the end of a step: within it, it would break vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        llm, written = self.llm.llm_engine, {}
        try:
            for i, ids in enumerate(prompts):
                params = SamplingParams(
                    temperature=0.0,  # the scribe has drawn; what is left is to take its choice
                    max_tokens=limit,
                    ignore_eos=True,  # which would be the tokenizer's; ours are the policy's
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
        """Put the policy's adapter in the place of the last one. None where the policy has its own switched off."""
        from vllm.lora.request import LoRARequest

        # What was cached of a prompt was computed with the last adapter, and goes by the adapter's name.
        self.llm.reset_prefix_cache()
        if not self.policy.model.get_model_status().enabled:
            return None
        with tempfile.TemporaryDirectory(prefix="hapo_adapter_") as folder:
            save_adapter(self.policy, Path(folder))
            self.llm.llm_engine.add_lora(LoRARequest("policy", ADAPTER, folder, load_inplace=True))
            return LoRARequest("policy", ADAPTER, folder)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Cache and weights on the GPU, and afterwards off it."""
        self.llm.wake_up()
        try:
            yield
        finally:
            self.desk.scribe = None
            self.llm.sleep(self.level)


def engine_arguments(recipe: Recipe, policy: Policy, max_new_tokens: int) -> dict[str, Any]:
    """What vLLM is started with. Raises UserError if the adapter does not fit or the 4-bit plug-in is missing."""
    base, rank = policy.model.get_base_model(), recipe.model.lora.rank
    room = next((r for r in RANKS if r >= rank), None)
    if room is None:
        raise UserError(f"model.lora.rank = {rank} is more than vLLM has room for: lower it to {RANKS[-1]}")
    arguments: dict[str, Any] = {
        "model": base.name_or_path,
        "revision": getattr(base.config, "_commit_hash", None),
        "trust_remote_code": recipe.model.trust_remote_code,
        "dtype": str(base.dtype).removeprefix("torch."),
        "seed": recipe.seed,
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": room,
        "max_num_seqs": recipe.rollout.batch_size,
        "max_model_len": min(policy.context, recipe.data.max_prompt_tokens + max_new_tokens),
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    if recipe.model.quantization == "nf4":
        if base.dtype == torch.float32:
            raise UserError("rollout.engine = vllm has no 4-bit base in fp32: set model.dtype=bf16 (or fp16)")
        if importlib.util.find_spec("vllm_bnb_plugin") is None:
            raise ImportError("vllm-bnb-plugin, which quantises the base to 4 bits, is missing")
        # Quantised as it is loaded: NF4 with double quantisation, the policy's own.
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    if policy.device.type == "cuda":
        arguments |= {"enable_sleep_mode": True, "gpu_memory_utilization": recipe.rollout.engine_memory}
    return arguments
