"""A check that llama.cpp's convert_hf_to_gguf.py can read a folder, made before anybody runs the converter.

The converter takes `architectures` and sizes from config.json, tensors from the safetensors files, the tokenizer from
tokenizer.json or tokenizer.model, and the chat template from chat_template.jinja or tokenizer_config.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hapo_lite.errors import UserError

READ_DTYPES = ("BF16", "F16", "F32")
"""The dtypes of safetensors that the converter reads."""
COMMAND = "python convert_hf_to_gguf.py {folder} --outfile {name}.gguf --outtype auto"
"""Runs in a checkout of llama.cpp with requirements/requirements-convert_hf_to_gguf.txt installed."""
QUANTISE = "llama-quantize {name}.gguf {name}-Q4_K_M.gguf Q4_K_M"


def check_for_converter(folder: Path) -> None:
    """Raise UserError with every problem that would stop the converter, if there is one."""
    if problems := problems_of(folder):
        raise UserError(f"llama.cpp's converter could not read the merged model: {'; '.join(problems)}")


def problems_of(folder: Path) -> list[str]:
    """A clause for each problem of a merged model's folder that would stop the converter."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    problems = []
    if len(config.get("architectures") or ()) != 1:
        problems.append("config.json does not name one architecture")
    if "quantization_config" in config:
        problems.append("config.json says that the weights are quantised")
    if isinstance(config.get("rope_parameters"), dict) and "rope_theta" not in config:
        problems.append("config.json gives rope_theta where only transformers 5 reads it")
    return problems + _problems_of_weights(folder, config) + _problems_of_tokenizer(folder, config)


def _problems_of_weights(folder: Path, config: dict[str, Any]) -> list[str]:
    dtypes: dict[str, str] = {}
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.offset_keys():
                part = tensors.get_slice(name)
                dtypes[name] = part.get_dtype()
                shapes[name] = part.get_shape()
    problems = [f"{name} is of dtype {dtype}" for name, dtype in dtypes.items() if dtype not in READ_DTYPES]
    problems += [f"{name} is a part of an adapter" for name in shapes if "lora_" in name or ".base_layer." in name]
    head = [name for name in shapes if name.endswith("lm_head.weight")]
    if not head and not config.get("tie_word_embeddings"):
        problems.append("there is no lm_head.weight, and config.json does not tie it to the embeddings")
    embeddings = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    if embeddings and embeddings[0][0] != config.get("vocab_size"):
        problems.append(f"the embeddings have {embeddings[0][0]} rows and vocab_size is {config.get('vocab_size')}")
    return problems


def _problems_of_tokenizer(folder: Path, config: dict[str, Any]) -> list[str]:
    if not (folder / "tokenizer.json").is_file():
        return [] if (folder / "tokenizer.model").is_file() else ["there is neither tokenizer.json nor tokenizer.model"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [token["id"] for token in tokenizer.get("added_tokens", ())]
    vocabulary = tokenizer["model"].get("vocab")
    ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary or ()))
    problems = []
    if max(ids) >= config.get("vocab_size", 0):
        problems.append(f"the tokenizer has id {max(ids)} and vocab_size is {config.get('vocab_size')}")
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if not settings.get("eos_token") and not isinstance(config.get("eos_token_id"), int):
        problems.append("neither tokenizer_config.json nor config.json names one end-of-sequence token")
    return problems
