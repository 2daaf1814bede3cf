"""A look at a model that was loaded, before anything relies on it: one forward pass of a few tokens.

Training scores completions without a mask and multiplies by the head's weight without calling the head. So a state may
depend on earlier tokens alone, and the logits have to be what `head_options` says. Axes: L tokens, D hidden,
V vocabulary.
"""

from __future__ import annotations

from typing import cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from hapo_lite.errors import UserError
from hapo_lite.model.decoder import call, decoder_of
from hapo_lite.model.policy import Policy
from hapo_lite.model.refusals import own_errors
from hapo_lite.recipe import ModelSettings

LENGTH = 6
SAME, SLACK = 0.02, 0.1
"""What counts as rounding in any dtype: a relative distance, and nats besides."""


@torch.no_grad()
def reads_changed_states(policy: Policy, settings: ModelSettings) -> bool:
    """Whether the model's head reads something else than the decoder's output.

    Raises UserError if the model fails when it runs or cannot run in 4 bits, if a state depends on a later token, or if
    the logits are not what the head's weight and `head_options` give.
    """
    base = policy.base
    was_training = policy.model.training
    policy.model.eval()
    try:
        with own_errors(settings.name, settings.quantization == "nf4"), policy.base_alone(), policy.autocast():
            seen = _Seen(base)
    finally:
        policy.model.train(was_training)
    if distance(seen.head_input[1, :-1], seen.head_input[0, :-1]) > SAME:
        raise UserError(f"model.name = {settings.name} {_looks_ahead(settings)}")
    for whole, states in ((False, seen.decoder_output), (True, seen.head_input)):
        if states is not None and _gives(policy, states[:, -1], seen.logits):
            return whole
    raise UserError(
        f"model.name = {settings.name} changes its logits after the head in a way that hapo_lite does not know, so "
        "training would score other probabilities than the model has; please report the model's name"
    )


def _gives(policy: Policy, states: Tensor, logits: Tensor) -> bool:
    """Whether the policy's scoring of states, [2, D], agrees with a model's logits, [2, V], but for rounding.

    The likeliest and the least likely token tell a scale, a cap, and states of another place apart.
    """
    for targets in (logits.argmax(dim=-1), logits.argmin(dim=-1)):
        logp, _ = policy.token_logprobs(states, targets, 1.0)
        wanted = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
        if float((logp - wanted).abs().max()) > SLACK + SAME * float(wanted.abs().max()):
            return False
    return True


def _looks_ahead(settings: ModelSettings) -> str:
    seen = (
        "is not causal: what it computes for a token depends on the tokens after it, so a completion has no probability"
    )
    if settings.attention == "sdpa":
        return (
            f"{seen}; with model.attention=eager some models are causal, otherwise choose a model that continues a text"
        )
    return f"{seen}; choose a model that continues a text"


class _Seen:
    """What passed through a model: head_input, decoder_output [2, L, D], and logits [2, V] of the last position.

    The two sequences differ in their last token alone. decoder_output is None if the decoder gives it in another form.
    """

    head_input: Tensor
    decoder_output: Tensor | None = None

    def __init__(self, base: PreTrainedModel) -> None:
        rows = int(cast(Tensor, base.get_input_embeddings().weight).shape[0])
        ids = (torch.arange(3, 3 + LENGTH, device=base.device) % rows).repeat(2, 1)
        ids[1, -1] = (ids[1, -1] + 1) % rows
        hooks = [
            *(m.register_forward_pre_hook(_check_packed) for m in base.modules() if isinstance(m, Linear4bit)),
            base.get_output_embeddings().register_forward_pre_hook(self._note_head),
            decoder_of(base).register_forward_hook(self._note_decoder),
        ]
        try:
            self.logits = call(base, input_ids=ids, use_cache=False).logits[:, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def _note_head(self, head: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.head_input = arguments[0]

    def _note_decoder(self, decoder: nn.Module, arguments: object, output: object) -> None:
        state = getattr(output, "last_hidden_state", None)
        self.decoder_output = state if isinstance(state, Tensor) else None


def _check_packed(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Raise UserError if a model has cast what a 4-bit layer reads to the dtype of its packed weight."""
    if not arguments[0].is_floating_point():
        raise UserError(
            "the model's own code casts what a layer reads to the dtype of the layer's weight, and in 4 bits that "
            "leaves nothing of it: set model.quantization=none"
        )


def distance(a: Tensor, b: Tensor) -> float:
    """Relative distance of two tensors; infinite for other shapes. Not a number if one of them holds none."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
