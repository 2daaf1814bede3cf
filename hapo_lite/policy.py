"""The policy: a causal language model with a frozen base (NF4 4-bit or full precision) and a LoRA adapter.

Axes: B sequences, T completion tokens, N tokens flattened, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hapo_lite.errors import UserError
from hapo_lite.head import next_token_logits, token_logprobs
from hapo_lite.origins import may_run_code, model_origin
from hapo_lite.recipe import ModelSettings
from hapo_lite.records import Sequences
from hapo_lite.unpacked import UnpackedBase


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


def load_policy(
    settings: ModelSettings,
    seed: int,
    device: torch.device | str,
    adapter: Path | None = None,
    engine: str = "transformers",
    unpacked: bool | None = None,
) -> Policy:
    """Load the base from a hub name or folder, quantise it, and put a fresh adapter on it.

    Only safetensors weights are read, and no code of the model's repository is run but with model.trust_remote_code.
    The adapter's initial weights depend on `seed` alone. adapter: a folder with a trained one instead, to sample from
    and not to train. engine: rollout.engine; `unsloth` loads the model itself. unpacked: whether a 4-bit base
    is unpacked once a rollout; None: where memory is free then. Raises UserError if there is no such model or it does
    not fit the settings.
    """
    device = torch.device(device)
    dtype = resolve_dtype(settings.dtype, device)
    try:
        origin = model_origin(settings)
        trust = may_run_code(settings, origin)
        source = {"revision": origin.commit, "trust_remote_code": trust}
        tokenizer = AutoTokenizer.from_pretrained(origin.name, padding_side="left", **source)
        if engine == "unsloth":
            from hapo_lite.rollout import unsloth_engine

            model, fast = unsloth_engine.load(settings, origin, dtype, seed, adapter)
            base = model.get_base_model()
        else:
            base = AutoModelForCausalLM.from_pretrained(
                origin.name,
                dtype=dtype,
                device_map={"": device},
                attn_implementation=settings.attention,
                quantization_config=_nf4(dtype) if settings.quantization == "nf4" else None,
                use_safetensors=True,
                **source,
            )
    except UserError:
        raise
    except Exception as error:
        # With its own code, a model may raise anything.
        known = (OSError, ValueError, ImportError, KeyError, SafetensorError)
        if not settings.trust_remote_code and not isinstance(error, known):
            raise
        raise UserError(_loading_problem(settings.name, error)) from error
    keep_weights_unpacked(base)
    stop_ids = find_stop_ids(base, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = stop_ids[0]
    # A model's own generation settings (top_k, repetition_penalty, ...) would silently change the sampled distribution.
    base.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=list(stop_ids))
    context = int(getattr(base.config, "max_position_embeddings", None) or tokenizer.model_max_length)
    if engine == "unsloth":
        return unsloth_engine.UnslothPolicy(model, tokenizer, stop_ids, context, dtype, str(origin), fast=fast)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = _fresh_adapter(base, settings, seed).train() if adapter is None else _saved_adapter(base, settings, adapter)
    dense = UnpackedBase(base, unpacked) if settings.quantization == "nf4" else None
    return Policy(model, tokenizer, stop_ids, context, dtype, str(origin), settings.activation_offload, dense)


def _fresh_adapter(base: PreTrainedModel, settings: ModelSettings, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    lora = settings.lora
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    try:
        model = get_peft_model(
            base,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=0.0,  # with dropout the ratio would differ from 1 before anything has been learned
                target_modules=targets,
                task_type="CAUSAL_LM",
            ),
        )
        if isinstance(base.get_output_embeddings(), BaseTunerLayer):
            raise ValueError("the head is among them, and training reads its frozen weight")
        return model
    except ValueError as error:
        raise UserError(f"model.lora.targets = {targets!r} does not fit {settings.name}: {error}") from error


def check_adapter(folder: Path) -> None:
    """Raises UserError where a folder is no saved adapter."""
    # Looked for first: without them peft would read a pickle, or ask the hub for a name that looks like the folder's.
    for needed in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / needed).is_file():
            raise UserError(f"adapter {folder} has no {needed}: give a folder like runs/NAME/adapter")


def _saved_adapter(base: PreTrainedModel, settings: ModelSettings, folder: Path) -> PeftModel:
    check_adapter(folder)
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"adapter {folder} does not fit {settings.name}: {_first_line(error)}") from error


def save_adapter(policy: Policy, folder: Path) -> None:
    """The adapter as plain peft reads it."""
    # Without this, peft asks the hub whether the base's embedding was resized.
    policy.model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bf16 where the GPU computes in it, else fp16; fp32 on CPU."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    # A T4 emulates bf16 and reports it as supported unless emulation is left out.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def templated(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **options: bool) -> str:
    """A chat as the model's template writes it. Raises UserError where the template fails.

    A template is a program that the model brings; transformers runs it in jinja's sandbox, which reaches no Python.
    """
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except Exception as error:
        problem = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"the chat template of {tokenizer.name_or_path} cannot be applied ({problem})") from error


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token id that ends a completion: of the model, its generation settings, its tokenizer and its chat
    template.

    Qwen2.5's base models name <|endoftext|> as their end, while their chat template closes a turn with <|im_end|>.
    """
    found: list[int] = []
    for ids in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        found += ids if isinstance(ids, list) else [ids]
    if tokenizer.chat_template is not None:
        answer = "answer"
        chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        text = templated(tokenizer, chat)
        after = tokenizer.encode(text.rpartition(answer)[2] if answer in text else "", add_special_tokens=False)
        found += [i for i in after[:1] if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    stop_ids = tuple(dict.fromkeys(i for i in found if i is not None))
    if not stop_ids:
        raise UserError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json")
    return stop_ids


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


def keep_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    Its first forward in evaluation mode repacks a Linear4bit for inference and never undoes it; training on the
    repacked weights then fails or, in layers without a bias, gives wrong gradients (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _loading_problem(name: str, error: Exception) -> str:
    folder = Path(name)
    if "trust_remote_code=True" in str(error):
        return (
            f"model.name = {name} brings Python code that it needs, which is not run: read it, and set "
            "model.trust_remote_code=true if it may run on this machine with your rights (docs/security.md)"
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return f"model.name = {name} is a folder without a config.json: give a folder that save_pretrained wrote"
        return f"model.name = {name} cannot be loaded: {_first_line(error)}"
    if folder.is_absolute() or name.startswith((".", "~")):
        return f"model.name = {name} is not a folder: give a folder that save_pretrained wrote, or a hub name"
    return (
        f"model.name = {name} is neither a folder here nor a model that the hub gives: check the name and the network "
        f"({_first_line(error)})"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
