"""The model card, README.md of an exported folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from hapo_lite.errors import counted
from hapo_lite.export.bases import BASES, Choice
from hapo_lite.export.gguf import COMMAND, QUANTISE
from hapo_lite.export.parity import Drift
from hapo_lite.export.source import Source
from hapo_lite.tiny.bundled import MODELS, TASKS
from hapo_lite.train.curves import closing_table

_ORIGINS = {"adapter": "went on from the adapter"}
"""Names in the table of facts of origins that are not those of what the run loaded throughout."""
TITLES = {
    "merged": "merged into its base",
    "gguf-ready": "merged into its base, for llama.cpp",
    "adapter": "LoRA adapter",
}
VARIANTS = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}
"""By the value of model.lora.variant, the name of the method."""
LOAD_MERGED = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained(".")'
)


def model_card(source: Source, record: dict[str, Any], output: Path | str) -> str:
    """The text of README.md: YAML for the hub, how to load the model, its training, its results and the recipe.

    record: the content of export.json. output: the folder that is exported, or the name on the hub that it is
    uploaded to.
    """
    parts = [
        f"---\n{front_matter(source, record).to_yaml()}\n---",
        f"# {source.recipe.name}: {TITLES[record['kind']]}",
        f"Trained from {_base(source)} with {source.method} by hapo_lite, on one {VARIANTS[source.model.lora.variant]} "
        f"adapter of rank {source.model.lora.rank}.",
        "## How to load it\n\n" + how_to_load(source, record, output),
        "## What it is\n\n" + facts(source, record),
        "## Before and after\n\n" + before_and_after(source),
        "## Licence\n\nThe base model's licence applies to what is derived from it, and that of the data may apply "
        "too. Read both before you pass this on.",
        f"## Recipe\n\n```yaml\n{source.recipe.to_yaml().strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(source: Source, record: dict[str, Any]) -> ModelCardData:
    """The metadata that the hub sorts models by. A base model or data set that is not on the hub is left out."""
    adapter = record["kind"] == "adapter"
    base = source.model.name if is_hub_name(source.model.name) else None
    data = source.recipe.data.source
    return ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        datasets=[data] if is_hub_name(data) else None,
        library_name="peft" if adapter else "transformers",
        license="other",
        license_name="that-of-the-base-model",
        pipeline_tag="text-generation",
        tags=[
            "hapo_lite",
            source.method,
            source.model.lora.variant,
            *([] if source.method == "sft" else ["reinforcement-learning"]),
        ],
    )


def is_hub_name(name: str) -> bool:
    """Whether `name` reads as OWNER/NAME and is not a file or folder on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def how_to_load(source: Source, record: dict[str, Any], output: Path | str) -> str:
    """Python lines that load the export, how to prompt it, and for llama.cpp the commands that convert it."""
    lines = _load_adapter(source) if record["kind"] == "adapter" else LOAD_MERGED
    run, folder = "Run this in the folder, or replace the dot by its path:", str(output)
    if isinstance(output, str):
        run, folder = "Run this:", output.partition("/")[2]
        lines = lines.replace('"."', f'"{output}"')
    lines += "\n\n" + _ask(source)
    text = [f"{run}\n\n```python\n{lines}\n```", how_to_ask(source)]
    if record["kind"] == "gguf-ready":
        names = {"folder": folder, "name": source.recipe.name}
        first = f"hf download {output} --local-dir {folder}\n" if isinstance(output, str) else ""
        text.append(
            "For llama.cpp, in a checkout of it with `requirements/requirements-convert_hf_to_gguf.txt` installed:\n\n"
            f"```\n{first}{COMMAND.format(**names)}\n{QUANTISE.format(**names)}\n```\n\n"
            "The converter recognises a tokenizer by how it splits a test text, and refuses one that it does not know."
        )
    return "\n\n".join(text)


def _ask(source: Source) -> str:
    """Python lines that ask the loaded model one question, as it was asked in training."""
    recipe = source.recipe
    system, options = recipe.data.system_prompt, source.model.chat_template_options
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": "9*7+4=?"})
    temperature = recipe.evaluation.temperature
    draw = f"do_sample=True, temperature={temperature:g}" if temperature > 0 else "do_sample=False"
    more = "".join(f", {name}={value!r}" for name, value in options.items())
    return (
        f"messages = {messages!r}\n"
        "ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, "
        f'return_tensors="pt"{more})\n'
        f"completion = model.generate(**ids, max_new_tokens={recipe.rollout.max_new_tokens}, {draw})\n"
        'print(tokenizer.decode(completion[0, ids["input_ids"].shape[1] :]))'
    )


def _load_adapter(source: Source) -> str:
    """Python lines that load the base and the adapter."""
    bundled = source.model.name in MODELS
    name = f'MODELS["{source.model.name}"]' if bundled else f'"{source.base}"'
    more_imports = "from hapo_lite.tiny.bundled import MODELS\n" if bundled else ""
    revision = f', revision="{source.revision}"' if source.revision else ""
    return (
        f"from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n{more_imports}\n"
        f'base = AutoModelForCausalLM.from_pretrained({name}{revision}, dtype="auto")\n'
        'model = PeftModel.from_pretrained(base, ".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")'
    )


def how_to_ask(source: Source) -> str:
    """The system message and the temperature that the run used, as sentences."""
    prompt = source.recipe.data.system_prompt
    if prompt:
        system = f"Ask through the chat template with the system message of the training:\n\n> {prompt}\n\n"
    else:
        system = "Ask through the chat template without a system message, as in training. "
    return f"{system}The model was evaluated at temperature {source.recipe.evaluation.temperature:g}."


def facts(source: Source, record: dict[str, Any]) -> str:
    """A table of the run's facts, and what the comparison with the adapter found, if the model was merged."""
    recipe = source.recipe
    summary = source.summary
    rows = {
        "base": _base(source) + (", 4-bit (NF4) in training" if source.model.quantization == "nf4" else ""),
        "method": source.method,
        "data": _data(source),
        **{_ORIGINS.get(what, f"{what} as loaded"): origin for what, origin in source.origins.items() if origin},
        "seed": recipe.seed,
    }
    choice = Choice.from_json(record)
    if choice is not None:
        rows["merged into"] = BASES[choice.onto]
    if summary:
        rows["training"] = (
            f"{counted(summary['iterations'], 'iteration')}, {counted(summary['updates'], 'update')}, "
            f"{_tokens(summary)}, "
            f"{summary['training_seconds'] / 3600:.2f} hours on {summary['machine']['device']}"
        )
        rows["trained with"] = _versions(summary["versions"])
    else:
        rows["training"] = f"a checkpoint of the run, {source.adapter.name}"
    rows |= {"adapter sha256": source.sha256, "exported with": _versions(record["versions"])}
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if "drift" in record:
        drift = Drift(**record["drift"])
        lines += ["", f"Checked: {drift.sentence()}. Computed in fp32, written in {drift.dtype}."]
        if choice is not None:
            lines += ["", f"Note: {choice.sentence()}."]
    elif source.model.quantization == "nf4":
        lines += ["", "The adapter was trained on the 4-bit base. On the 16-bit base it behaves a little differently."]
    return "\n".join(lines)


def _tokens(summary: dict[str, Any]) -> str:
    """How many tokens a run sampled; those of the solutions, for a warm start, which samples none."""
    if "trained_tokens" in summary:
        return f"{summary['trained_tokens']:,} tokens of worked solutions"
    return f"{summary['sampled_tokens']:,} tokens sampled"


def before_and_after(source: Source) -> str:
    """The run's closing table and its verdict, both from summary.json."""
    if not source.summary:
        return "Not known: this is a checkpoint of a run, not the adapter that the run ended with."
    evaluation = source.summary["evaluation"]
    verdict = source.summary["verdict"]
    # The last line of metrics has training's numbers too, which have no "before".
    ends = [
        {key: value for key, value in line.items() if key.startswith("eval/")}
        for line in (evaluation["before"], evaluation["after"])
        if line
    ]
    said = "\n".join([verdict["sentence"], *(f"- {reason}" for reason in verdict["because"])])
    if not ends:
        return said
    asked = f"{counted(evaluation['prompts'], 'held-out prompt')}, {counted(evaluation['samples'], 'sample')} each."
    return f"{asked}\n\n```\n{closing_table(ends, evaluation['samples'])}\n```\n\n{said}"


def _base(source: Source) -> str:
    if source.model.name in MODELS:
        return f"hapo_lite's bundled model {source.model.name}"
    return source.model.name + (f" at {source.revision}" if source.revision else "")


def _data(source: Source) -> str:
    data = source.recipe.data
    if data.source in TASKS:
        return f"the built-in task {data.source}"
    parts = {"config": data.config, "split": data.split, "revision": data.revision}
    named = ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    return f"{data.source} ({named})"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
