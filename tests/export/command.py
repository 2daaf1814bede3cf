"""The export command on a run, and what the exports are compared by."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from hapo_lite.cli import run_command
from hapo_lite.export import __main__ as command
from hapo_lite.runs.trace import read_traces

WEIGHTS = "adapter_model.safetensors"


def complaint(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run_command(command.main, [str(a) for a in arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    return line


def scored(model, tokenizer, run: Path) -> torch.Tensor:
    """Log-probabilities of the last traces' completions, by plain transformers."""
    rows = []
    for trace in read_traces(sorted((run / "traces").iterdir())[-1]):
        chat = [{"role": role, "content": content} for role, content in trace.messages]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
        ids = torch.tensor(trace.tokens["id"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0, len(prompt) - 1 : -1]
        rows.append(logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    return torch.cat(rows)


def set_model(run: Path, **changes) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"] |= changes
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
