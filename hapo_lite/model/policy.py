"""The policy: a causal language model with a frozen base (NF4 4-bit or full precision) and a LoRA adapter.

Axes: B sequences, T completion tokens, N tokens flattened, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hapo_lite.errors import UserError
from hapo_lite.head import next_token_logits, token_logprobs
from hapo_lite.model.decoder import head_input
from hapo_lite.model.template import Rendering, after_answer, encode_chat, text_of
from hapo_lite.model.unpacked import UnpackedBase
from hapo_lite.records import Sequences

MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
"""Types of models whose config has `logits_scaling` as a factor. In the others it is a divisor."""


@dataclass(frozen=True)
class Policy:
    """A language model with its adapter and tokenizer, ready for training and sampling.

    model: the base with its adapter. stop_ids: each of them ends a completion. context: longest sequence, tokens.
    dtype: of the model's products; bf16 and fp16 by autocast, which leaves the adapter's weights in fp32. origin: the
    commit or the digest of the base, as a string of `origins.Origin`. offload: whether activations wait for the
    backward in main memory. dense: makes the unpacked copy of a 4-bit base; None for another base. rendering: how the
    chat template is rendered. started_from: the adapter of model.adapter and the hash of its weights; "" for a new one.
    whole: whether the head reads something else than the decoder's output, so that the whole model is called to score.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    context: int
    dtype: torch.dtype = torch.float32
    origin: str = ""
    offload: bool = False
    dense: UnpackedBase | None = None
    rendering: Rendering = field(default_factory=Rendering)
    started_from: str = ""
    whole: bool = False

    steps: ClassVar[bool] = True
    """Whether the decoder can be called token by token with a cache."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def base(self) -> PreTrainedModel:
        """The base model, with the adapter's layers in it."""
        return cast(PreTrainedModel, self.model.get_base_model())  # peft says Module

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, in a fixed order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def encode(self, chat: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to the place where the assistant's answer begins.

        Raises UserError if the chat template fails, or if the model has no embedding for one of the tokens.
        """
        return self._embedded(encode_chat(self.tokenizer, chat, self.rendering))

    def encode_answer(self, text: str, end: int) -> list[int]:
        """Token ids of an assistant's answer after `encode`d messages, with the token that ends its turn.

        end: that token, from `end_of_turn`, which renders the chat template anew at each call. Raises UserError if the
        model has no embedding for one of the tokens.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return self._embedded([*ids, end])

    @property
    def end_of_turn(self) -> int:
        """The id that the chat template ends an answer with, if it ends a completion; else the first that does."""
        after = after_answer(self.tokenizer, self.rendering)
        return after[0] if after and after[0] in self.stop_ids else self.stop_ids[0]

    @cached_property
    def opening(self) -> str:
        """`<think>` if the chat template opens a thought before the assistant's answer, as some do; else ""."""
        written = text_of(self.tokenizer, self.encode([{"role": "user", "content": "?"}]), hidden=())
        return "<think>" if written.rfind("<think>") > written.rfind("</think>") else ""

    def _embedded(self, ids: list[int]) -> list[int]:
        rows = embedding_rows(self.base)
        if ids and max(ids) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the tokenizer of {self.tokenizer.name_or_path} writes the token {token!r} as {max(ids)}, and the "
                f"model has embeddings for 0 to {rows - 1:,}: resize the model's embeddings, or use the tokenizer that "
                "belongs to it"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a completion, without stop and padding tokens. Other special tokens, such as <think>, stay."""
        return text_of(self.tokenizer, ids, (*self.stop_ids, self.tokenizer.pad_token_id))

    def completion_logprobs(self, batch: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of every completion token, nats: [B, T] each, fp32, 0 where the mask is false.

        Right padding needs no attention mask, because under causal attention no real token sees what comes after it.
        """
        return self.masked_logprobs(self.head_states(batch), batch, temperature)

    def head_states(self, batch: Sequences) -> Tensor:
        """The head's input of every position, [B, L, D], in the policy's precision."""
        with self.autocast():
            return self.hidden_states(batch.ids)

    def masked_logprobs(self, hidden: Tensor, batch: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
        """`completion_logprobs` from the batch's `head_states`: the head computes the tokens of the mask alone."""
        rows, columns = batch.mask.nonzero(as_tuple=True)
        # The state at a position predicts the next token, so completion token t is predicted at prompt + t - 1.
        states = hidden[rows, batch.prompt_lengths[rows] + columns - 1]
        targets = batch.ids[rows, batch.prompt_lengths[rows] + columns]
        logp, entropy = self.token_logprobs(states, targets, temperature)
        blank = logp.new_zeros(batch.mask.shape)
        return blank.index_put((rows, columns), logp), blank.index_put((rows, columns), entropy)

    def token_logprobs(self, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each target, nats, [N] each. states: the head's input, [N, D]."""
        weight = self.base.get_output_embeddings().weight
        return token_logprobs(states, weight, targets, temperature, **head_options(self.base))

    def rounded_logprobs(self, states: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Log-probabilities, [N], from logits that the head's layer computes in the policy's dtype. No gradient."""
        head, options = self.base.get_output_embeddings(), head_options(self.base)
        with torch.no_grad(), self.autocast():
            logits = nn.functional.linear(states, head.weight, options["bias"]).float() * options["logit_scale"]
        if cap := options["soft_cap"]:
            logits = cap * torch.tanh(logits / cap)
        return torch.log_softmax(logits / temperature, dim=-1).gather(1, targets[:, None]).squeeze(1)

    def autocast(self) -> contextlib.AbstractContextManager:
        """A context with the precision that the policy computes in, for training and sampling alike."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """The head's input, [B, L, D]. ids: [B, L]."""
        with self._offloading():
            return head_input(self.base, self.whole, input_ids=ids, use_cache=False)

    def _offloading(self) -> contextlib.AbstractContextManager:
        """A context that keeps activations in main memory until the backward if `offload` is set. No bit changes."""
        if not self.offload:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    @contextlib.contextmanager
    def base_alone(self) -> Iterator[None]:
        """A context within which the adapter is disabled. Its weights and its place in the optimiser stay."""
        with self.model.disable_adapter():
            yield

    def unpacked(self, exact: bool = False, in_update: bool = False) -> contextlib.AbstractContextManager:
        """A context within which a 4-bit base is unpacked once, if memory allows, instead of in every forward pass.

        exact: unpack only where the results equal those of the packed layers to the last bit, as scoring and updates
        need. That is so on a CPU; on a GPU, packed layers have kernels that round differently. in_update: see
        `UnpackedBase.held`.
        """
        if self.dense is None or (exact and self.device.type != "cpu"):
            return contextlib.nullcontext()
        return self.dense.held(in_update)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[PreTrainedModel]:
        """A context with the model as a sampler calls it. Training mode is restored at the end, after an error too.

        The model is in evaluation mode, without gradients, in the trainer's precision, and its head gives fp32 logits
        (see `trainers_head`).
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast(), self.unpacked(), trainers_head(self.base):
                yield cast(PreTrainedModel, self.model)  # a PeftModel passes on the base's methods
        finally:
            if was_training:
                self.model.train()


@contextlib.contextmanager
def trainers_head(model: PreTrainedModel) -> Iterator[None]:
    """A context within which the head's forward is `next_token_logits`, which gives fp32 logits.

    The head's linear layer rounds its logits to the weight's dtype, and copies its weight for each row when it is given
    one position of a longer sequence. A head with an adapter keeps its forward, of which the adapter is a part.
    """
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


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of tokens that a model has an embedding for."""
    return int(cast(Tensor, model.get_input_embeddings().weight).shape[0])


def head_options(model: PreTrainedModel) -> dict[str, Any]:
    """What a model does to its logits after the product with its head's weight, as options of `token_logprobs`.

    Cohere multiplies by `logit_scale`, Falcon-H1 by `lm_head_multiplier`, Granite divides by `logits_scaling`, Gemma 2
    to 4 cap, Phi adds a bias. A model of several parts keeps these numbers in the config of its text part.
    """
    config = model.config.get_text_config()
    factors = ("logit_scale", "lm_head_multiplier", "output_multiplier")
    scale = math.prod(float(getattr(config, name, None) or 1.0) for name in factors)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    if config.model_type in MULTIPLIES_BY_LOGITS_SCALING:
        divisor = 1.0 / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is None and config.model_type == "recurrent_gemma":
        cap = config.logits_soft_cap
    return {
        "bias": getattr(model.get_output_embeddings(), "bias", None),
        "logit_scale": scale / divisor,
        "soft_cap": cap,
    }
