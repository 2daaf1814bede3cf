"""A policy whose model Unsloth loads. Unsloth is imported here alone, when a recipe names it.

Importing Unsloth, and loading a model with it, changes classes of transformers and peft for the whole process. Axes: B
sequences, L tokens of a sequence, D hidden.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.adapter import check_adapter, peft_packages
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.model.origins import Origin
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import ModelSettings

HIDDEN_STATES = "UNSLOTH_RETURN_HIDDEN_STATES"
"""An environment variable that Unsloth reads in every forward. If it is 1, `.logits` holds the head's input."""


@dataclass(frozen=True)
class UnslothPolicy(Policy):
    """A policy whose model Unsloth loaded.

    fast: Unsloth's class, which switches the model between its two modes. checkpointing: model.gradient_checkpointing.
    """

    fast: Any = None
    checkpointing: bool = False
    steps: ClassVar[bool] = False

    def hidden_states(self, ids: Tensor) -> Tensor:
        # Unsloth's forward calls the decoder with other arguments than transformers does, so the whole model is called.
        with variable(HIDDEN_STATES, "1"):
            states = self.model(input_ids=ids, use_cache=False).logits
        if states.shape[-1] != self.model.get_output_embeddings().weight.shape[1]:
            raise UserError(
                f"this version of Unsloth does not know {HIDDEN_STATES} for this model: use rollout.engine=transformers"
            )
        return states

    @contextlib.contextmanager
    def sampling(self) -> Iterator[PreTrainedModel]:
        """A context with the model in Unsloth's inference mode, which also pads on the left.

        Training mode is restored at the end if the model was in it before.
        """
        was_training = self.model.training
        self.fast.for_inference(self.model)
        try:
            with torch.no_grad():
                yield cast(PreTrainedModel, self.model)  # a PeftModel passes on the base's methods
        finally:
            if was_training:
                # Its default turns gradient checkpointing on.
                self.fast.for_training(self.model, use_gradient_checkpointing=self.checkpointing)


@contextlib.contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """A context within which an environment variable has a value. Afterwards it is restored."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load(
    settings: ModelSettings, origin: Origin, dtype: torch.dtype, seed: int, adapter: Path | None
) -> tuple[PeftModel, Any]:
    """Base and adapter as Unsloth loads them, and the class that switches modes.

    settings, seed, adapter: as in `load_policy`. Raises UserError without a GPU, without Unsloth, or if the saved
    adapter does not fit.
    """
    if not torch.cuda.is_available():
        raise UserError("rollout.engine = unsloth needs a GPU: use rollout.engine=transformers on a CPU")
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError) as error:
        raise UserError(f"rollout.engine = unsloth cannot be imported ({error}): pip install -e .[unsloth]") from error
    config = AutoConfig.from_pretrained(
        origin.name, revision=origin.commit, trust_remote_code=settings.trust_remote_code
    )
    rank, alpha, targets = settings.lora.rank, settings.lora.alpha, settings.lora.targets
    rslora = settings.lora.variant == "rslora"
    if adapter is not None:
        check_adapter(adapter)
        saved = LoraConfig.from_pretrained(str(adapter))  # its scale is the one that it was trained with
        rank, alpha, targets, rslora = saved.r, saved.lora_alpha, saved.target_modules, saved.use_rslora
    # With "unsloth", activations wait for the backward in main memory.
    checkpointing = "unsloth" if settings.gradient_checkpointing else False
    base, _ = FastLanguageModel.from_pretrained(
        origin.name,
        revision=origin.commit,
        max_seq_length=config.get_text_config().max_position_embeddings,
        dtype=dtype,
        load_in_4bit=settings.quantization == "nf4",
        use_exact_model_name=True,  # else Unsloth may load its own copy, quantised in advance
        use_gradient_checkpointing=checkpointing,
        max_lora_rank=rank,
        trust_remote_code=settings.trust_remote_code,
    )
    with peft_packages():
        model = FastLanguageModel.get_peft_model(
            base,
            r=rank,
            lora_alpha=alpha,
            use_rslora=rslora,
            target_modules=targets if isinstance(targets, str) else sorted(targets),
            use_gradient_checkpointing=checkpointing,
            random_state=seed,
        )
    if adapter is not None:
        weights = load_file(adapter / "adapter_model.safetensors")
        try:
            outcome: Any = set_peft_model_state_dict(model, weights)  # peft's annotation names no fields
            left_over = outcome.unexpected_keys
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise  # the adapter may well fit the model
            left_over = [first_line(error)]
        if left_over:
            raise UserError(f"adapter {adapter} does not fit {settings.name}: {left_over[0]}")
    return model, FastLanguageModel
