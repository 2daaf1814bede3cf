"""From a hub name or a folder to a policy."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import distributed, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from hapo_lite.errors import UserError, first_line
from hapo_lite.model.adapter import fresh_adapter, saved_adapter
from hapo_lite.model.attention import use_fused_attention
from hapo_lite.model.examine import reads_changed_states
from hapo_lite.model.noise import switch_off_noise
from hapo_lite.model.oom import is_out_of_memory
from hapo_lite.model.origins import Origin, may_run_code, model_origin
from hapo_lite.model.policy import Policy, embedding_rows
from hapo_lite.model.refusals import is_of_card, known_problem
from hapo_lite.model.start import read_start, starting_adapter
from hapo_lite.model.template import Rendering, after_answer, check_options, today
from hapo_lite.model.unpacked import UnpackedBase, Unpacking
from hapo_lite.recipe import ModelSettings


def load_policy(
    settings: ModelSettings,
    seed: int,
    device: torch.device | str,
    adapter: Path | None = None,
    engine: str = "transformers",
    unpacked: Unpacking = Unpacking.IF_FREE,
) -> Policy:
    """Load the base from a hub name or folder, quantise it if asked to, and put an adapter on it.

    Only safetensors weights are read. Code from the model's repository is run only with model.trust_remote_code.
    adapter: a folder with a trained adapter, to sample from and not to train; None: that of model.adapter, to train
    further, or else a new one, whose weights depend on `seed` alone. engine: rollout.engine; with `unsloth`, Unsloth
    loads the model. unpacked: whether a 4-bit base is unpacked once in each rollout. The processes of a run load the
    model together, and take the first one's date for the chat template. Raises UserError if there is no such model or
    adapter, or if one of them does not fit the settings.
    """
    device = torch.device(device)
    dtype = resolve_dtype(settings.dtype, device)
    check_attention(settings.attention, dtype)
    use_fused_attention(device)
    origin = find_origin(settings)
    start = starting_adapter(settings, origin) if adapter is None else None
    with _loading(settings, origin):
        trust = may_run_code(settings, origin)
        source = {"revision": origin.commit, "trust_remote_code": trust}
        tokenizer = read_tokenizer(origin, source)
        if engine == "unsloth":
            from hapo_lite.model import unsloth

            model, fast = unsloth.load(settings, origin, dtype, seed, start.folder if start else adapter)
            base: PreTrainedModel = cast(PreTrainedModel, model.get_base_model())  # peft says Module
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
    keep_weights_unpacked(base)
    switch_off_noise(base)
    check_options(tokenizer, settings.chat_template_options)
    day = of_first_process(settings.chat_template_date or today())
    rendering = Rendering(settings.chat_template_options, day)
    stop_ids = find_stop_ids(base, tokenizer, rendering)
    choose_pad_token(base, tokenizer, stop_ids)
    # The model's generation settings (top_k, repetition_penalty, ...) would silently change the sampled distribution.
    base.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=list(stop_ids))
    config = base.config.get_text_config()
    context = int(getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
    began = str(start or "")
    if engine == "unsloth":
        parts = (model, tokenizer, stop_ids, context, dtype, str(origin))
        return unsloth.UnslothPolicy(
            *parts,
            rendering=rendering,
            started_from=began,
            fast=fast,
            checkpointing=settings.gradient_checkpointing,
        )
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = fresh_adapter(base, settings, seed).train() if adapter is None else saved_adapter(base, settings, adapter)
    if start is not None:
        read_start(model, start, settings)
    dense = UnpackedBase(base, unpacked) if settings.quantization == "nf4" else None
    policy = Policy(model, tokenizer, stop_ids, context, dtype, str(origin), settings.offloads, dense, rendering, began)
    return replace(policy, whole=reads_changed_states(policy, settings))


def of_first_process(day: datetime.date) -> datetime.date:
    """The day that the first process of a run gives, since clocks differ and midnight may pass between two processes.

    All processes call this at the same place. A program of one process keeps its own day.
    """
    days = [day]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(days)
    return days[0]


def read_tokenizer(origin: Origin, source: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. source: revision and trust_remote_code, for `from_pretrained`.

    One that was saved as transformers' general class is all in tokenizer.json. For some types of models, such as
    qwen2, AutoTokenizer would read it as the type's own class, which splits text by rules of its own.
    """
    saved = get_tokenizer_config(origin.name, revision=origin.commit)
    general = saved.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in saved
    kind = PreTrainedTokenizerFast if general else AutoTokenizer
    return kind.from_pretrained(origin.name, padding_side="left", **source)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name. `auto`: bf16 on a GPU that computes in it, fp16 on another GPU, fp32 on a CPU."""
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    # A T4 emulates bf16, and reports support unless emulation is excluded.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_attention(attention: str, dtype: torch.dtype) -> None:
    """Raise UserError for eager attention in fp16, whose scores overflow.

    Eager attention multiplies queries and keys in the model's dtype before it scales them. In Qwen2.5 that exceeds
    fp16's largest number, and the model writes "!!!!".
    """
    if attention == "eager" and dtype == torch.float16:
        raise UserError(
            "model.attention = eager overflows in fp16, which model.dtype asks for or this GPU needs: "
            "use model.attention=sdpa"
        )


def find_stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rendering: Rendering | None = None
) -> tuple[int, ...]:
    """Every token id that ends a completion, from the model, its generation settings, tokenizer and chat template.

    They can differ: Qwen2.5's base models name <|endoftext|>, but their chat template ends a turn with <|im_end|>.
    Raises UserError if there is none.
    """
    found: list[int] = []
    # A model of several parts may have them in its text part's config alone.
    for holder in (model.generation_config, model.config, model.config.get_text_config(), tokenizer):
        ids: Any = getattr(holder, "eos_token_id", None)
        found += ids if isinstance(ids, list) else [ids]
    after = after_answer(tokenizer, rendering)
    found += [i for i in after[:1] if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    stop_ids = tuple(dict.fromkeys(i for i in found if i is not None))
    if not stop_ids:
        raise UserError("the model names no end-of-sequence token: set eos_token_id in its generation_config.json")
    return stop_ids


def choose_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...]) -> None:
    """Give the tokenizer a padding token that the model has an embedding for. Masks hide padding, so any will do.

    A padding token that was added to the tokenizer alone has an id beyond the embeddings.
    """
    rows = embedding_rows(model)
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id >= rows:
        tokenizer.pad_token_id = next((i for i in stop_ids if i < rows), 0)


def keep_weights_unpacked(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights on CPUs with AVX512-BF16.

    The first forward pass in evaluation mode repacks a Linear4bit for inference and never undoes it. Training on the
    repacked weights fails or, in layers without a bias, gives wrong gradients (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # torch types it as a Module


def _nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def find_origin(settings: ModelSettings) -> Origin:
    """`model_origin`, with a UserError if nothing is found."""
    name, folder = settings.name, Path(settings.name)
    try:
        return model_origin(settings)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise UserError(f"model.name = {name} cannot be read: {first_line(error)}") from error
        if folder.is_absolute() or name.startswith((".", "~")):
            raise UserError(
                f"model.name = {name} is not a folder: give a folder that save_pretrained wrote, or a hub name"
            ) from error
        raise UserError(
            f"model.name = {name} is neither a folder here nor a model that the hub gives: check the name and the "
            f"network ({first_line(error)})"
        ) from error


@contextlib.contextmanager
def _loading(settings: ModelSettings, origin: Origin) -> Iterator[None]:
    """A context that turns the errors of libraries which load a model into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # A model that comes with code may raise any error, of which memory and the card are no part.
        known = (OSError, ValueError, ImportError, KeyError, SafetensorError)
        foreign = not settings.trust_remote_code or is_out_of_memory(error) or is_of_card(error)
        if foreign and not isinstance(error, known):
            raise
        problem = known_problem(settings, error)
        raise UserError(
            problem or f"model.name = {settings.name} was found ({origin}), and cannot be loaded: {first_line(error)}"
        ) from error
