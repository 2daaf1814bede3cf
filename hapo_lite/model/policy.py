"""The policy: a causal language model with a frozen base (NF4 4-bit or full precision) and a LoRA adapter.

Axes: B sequences, T completion tokens, N tokens flattened, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hapo_lite.errors import UserError, first_line
from hapo_lite.head import next_token_logits, token_logprobs
from hapo_lite.model.unpacked import UnpackedBase
from hapo_lite.records import Sequences


@dataclass(frozen=True)
class Policy:
    """model: the base with its adapter; stop_ids: any of them ends a completion; context: longest sequence, tokens.

    dtype: of the model's products; bf16 and fp16 by autocast, which leaves the adapter's weights in fp32.
    origin: what the base was when it was loaded, as in origins.Origin.
    offload: what is kept for the backward waits in main memory. dense: a 4-bit base's unpacked copy; None: it has none.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    context: int
    dtype: torch.dtype = torch.float32
    origin: str = ""
    offload: bool = False
    dense: UnpackedBase | None = None

    steps: ClassVar[bool] = True
    """Whether the decoder can be called token by token with a cache."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, in a fixed order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def encode(self, chat: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat up to where the assistant begins to write."""
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(message["content"] for message in chat) + "\n\n"
            return self.tokenizer.encode(text)
        text = templated(self.tokenizer, chat, add_generation_prompt=True)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def completion_logprobs(self, batch: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every completion token, [B, T] each, fp32; 0 beyond a completion's length.

        Right padding needs no attention mask: under causal attention no real token sees what comes after it.
        """
        with self.autocast():
            hidden = self.hidden_states(batch.ids)
        rows, columns = batch.mask.nonzero(as_tuple=True)
        # The state at a position predicts the next token, so completion token t is predicted at prompt + t - 1.
        states = hidden[rows, batch.prompt_lengths[rows] + columns - 1]
        targets = batch.ids[rows, batch.prompt_lengths[rows] + columns]
        logp, entropy = self.token_logprobs(states, targets, temperature)
        blank = logp.new_zeros(batch.mask.shape)
        return blank.index_put((rows, columns), logp), blank.index_put((rows, columns), entropy)

    def token_logprobs(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each target, [N] each, from what the head reads, [N, D]."""
        base = self.model.get_base_model()
        weight = base.get_output_embeddings().weight
        return token_logprobs(states, weight, targets, temperature, **head_options(base))

    def rounded_logprobs(self, states: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The log-probabilities alone, of logits that the head's own layer makes in the policy's dtype. No gradient."""
        base = self.model.get_base_model()
        head, options = base.get_output_embeddings(), head_options(base)
        with torch.no_grad(), self.autocast():
            logits = nn.functional.linear(states, head.weight, options["bias"]).float() * options["logit_scale"]
        if cap := options["soft_cap"]:
            logits = cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None]).squeeze(1)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the policy computes in, for training and sampling alike."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """What the head reads, [B, L, D]. ids: [B, L]."""
        with self._keeping():
            return self.model.get_base_model().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state

    def _keeping(self) -> contextlib.AbstractContextManager:
        """Where tensors wait for the backward; the same bits come back."""
        if not self.offload:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    @contextlib.contextmanager
    def base_alone(self) -> Iterator[None]:
        """The base model without its adapter, whose weights and place in the optimiser stay as they are."""
        with self.model.disable_adapter():
            yield

    def unpacked(self, exact: bool = False) -> contextlib.AbstractContextManager:
        """Within, a 4-bit base is unpacked once, if memory allows, instead of in every forward.

        exact: only where that gives the packed layers' numbers to the last bit, as scoring needs it: on a CPU. A GPU
        has kernels of its own for packed layers.
        """
        if self.dense is None or (exact and self.device.type != "cpu"):
            return contextlib.nullcontext()
        return self.dense.held()

    @contextlib.contextmanager
    def sampling(self) -> Iterator[PreTrainedModel]:
        """The model as a sampler calls it; training mode comes back whatever happens inside.

        It is in evaluation mode, without gradients, computes what the trainer computes, and its head makes fp32 logits
        without a copy of its weight: a linear layer that is given one position of a longer sequence makes one for each
        row, and rounds its logits to the weight's dtype.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast(), self.unpacked(), trainers_head(self.model.get_base_model()):
                yield self.model
        finally:
            self.model.train(was_training)


@contextlib.contextmanager
def trainers_head(model: PreTrainedModel) -> Iterator[None]:
    """Within, the head's forward is `next_token_logits`; one with an adapter keeps its own, to which that belongs."""
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        logits = next_token_logits(hidden.reshape(-1, hidden.shape[-1]), head.weight, getattr(head, "bias", None))
        return logits.view(*hidden.shape[:-1], -1)

    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def templated(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: bool) -> str:
    """A chat as the model's template writes it. Raises UserError where the template fails.

    A template is a program that the model brings; transformers runs it in jinja's sandbox, which reaches no Python.
    """
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except Exception as error:
        problem = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot be applied ({problem})") from error


def head_options(model: PreTrainedModel) -> dict[str, Any]:
    """What a model does to its logits after the product with its head, as options of `token_logprobs`.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 and 3 cap, Phi adds a bias.
    """
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    return {
        "bias": getattr(model.get_output_embeddings(), "bias", None),
        "logit_scale": float(scale) / float(getattr(config, "logits_scaling", None) or 1.0),
        "soft_cap": getattr(config, "final_logit_softcapping", None),
    }
