"""Prompts and completions of the run itself, and a model's log-probabilities and answers on them.

Axes: T tokens of one completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hapo_lite.errors import UserError
from hapo_lite.export.source import Source
from hapo_lite.model.policy import Policy
from hapo_lite.records import Sequences, pad, put
from hapo_lite.runs.trace import salvage_traces
from hapo_lite.tasks.data import load_prompts

TEXTS = 32
"""Number of completions that are scored."""
TEXT_TOKENS = 256
"""Tokens of each completion that are scored, at most."""
TEXTS_AT_ONCE = 8
"""Texts in one forward pass."""
PROMPTS = 8
"""Number of prompts that are answered greedily."""
ANSWER_TOKENS = 64
"""Longest greedy answer, tokens."""

WIDENED = "hapo_lite_widened"
"""Attribute that marks a layer whose weights are converted to fp32 while it is called."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its completion."""


@dataclass(frozen=True)
class Probes:
    """Inputs that models are compared on. texts: from the newest traces. prompts: token ids of the first prompts."""

    texts: tuple[Text, ...]
    prompts: tuple[tuple[int, ...], ...]


def gather_probes(source: Source, policy: Policy, say: Callable[[str], None]) -> Probes:
    """The probes from the run's traces and data. say: prints a line.

    Raises UserError if neither the traces nor the data of the run can be read.
    """
    texts: list[Text] = []
    vocabulary = policy.base.get_output_embeddings().weight.shape[0]
    for file in sorted(source.folder.traces.glob("[0-9]*.jsonl"), reverse=True):
        for trace in salvage_traces(file).traces:
            prompt = policy.encode([{"role": role, "content": content} for role, content in trace.messages])
            ids = trace.tokens["id"][: min(TEXT_TOKENS, policy.context - len(prompt))]
            if ids and max(ids) < vocabulary:
                texts.append((tuple(prompt), tuple(ids)))
        if len(texts) >= TEXTS:
            break
    prompts = _prompts_of_data(source, policy, say) or list(dict.fromkeys(prompt for prompt, _ in texts))
    if not prompts:
        raise UserError(
            f"{source.folder.path} has no traces and its data ({source.recipe.data.source}) cannot be read: there is "
            "nothing to compare the merged model on"
        )
    return Probes(tuple(texts[:TEXTS]), tuple(prompts[:PROMPTS]))


def _prompts_of_data(source: Source, policy: Policy, say: Callable[[str], None]) -> list[tuple[int, ...]]:
    """Token ids of the first prompts in the run's data that leave room for an answer; empty if it cannot be read."""
    data = source.recipe.data
    try:
        found = load_prompts(data.model_copy(update={"limit": PROMPTS}))
    except UserError as error:
        say(f"note: the run's data cannot be read, so the prompts of its traces are answered instead: {error}")
        return []
    encoded = [tuple(policy.encode(prompt.chat())) for prompt in found.prompts]
    return [ids for ids in encoded if len(ids) + ANSWER_TOKENS <= policy.context]


def compute_in_fp32(policy: Policy) -> Policy:
    """The same model, computing in fp32. A layer with 16-bit weights converts them while it is called.

    In bf16 the rounding of activations alone changes log-probabilities more than merging does (docs/export.md).
    """
    for module in policy.model.modules():
        narrow = [p for p in module.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)]
        if narrow:
            _widen_while_called(module, narrow)
            setattr(module, WIDENED, True)
    return replace(policy, dtype=torch.float32)


def _widen_while_called(module: nn.Module, narrow: Sequence[nn.Parameter]) -> None:
    held = contextlib.ExitStack()

    def widen(*_: Any) -> None:
        held.enter_context(_widened(narrow))

    def restore(*_: Any) -> None:
        held.close()

    module.register_forward_pre_hook(widen)
    module.register_forward_hook(restore, always_call=True)


@contextlib.contextmanager
def _widened(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context within which the parameters are fp32. Afterwards they hold their original tensors again."""
    kept = [p.data for p in parameters]
    for p in parameters:
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


@torch.no_grad()
def logprobs(policy: Policy, texts: Sequence[Text]) -> Tensor:
    """Log-probability of every completion token, nats, [all T]: one text after the other, fp64 on the CPU."""
    rows = []
    head = policy.base.get_output_embeddings()
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[start : start + TEXTS_AT_ONCE]
        ids = [torch.tensor([*prompt, *completion]) for prompt, completion in some]
        lengths = torch.tensor([len(completion) for _, completion in some])
        batch = Sequences(
            pad(ids, policy.device),
            put(torch.tensor([len(prompt) for prompt, _ in some]), policy.device),
            put(lengths, policy.device),
            put(torch.arange(int(lengths.max()))[None] < lengths[:, None], policy.device),
        )
        # The policy multiplies by the head's weight without calling the head, so the head's hooks do not run.
        with _widened([head.weight]) if hasattr(head, WIDENED) else contextlib.nullcontext():
            rows.append(policy.completion_logprobs(batch)[0][batch.mask].double().cpu())
    return torch.cat(rows)


def answers(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy completions, stop token included. All models compare on the same batch, padded on the left."""
    longest = max(len(ids) for ids in prompts)
    blank = policy.tokenizer.pad_token_id
    given = torch.tensor([[blank] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    limit = min(ANSWER_TOKENS, policy.context - longest)
    with policy.sampling() as model:
        written = model.generate(  # type: ignore[operator]  # transformers declares it in a mixin
            input_ids=put(given, policy.device),
            attention_mask=put(mask, policy.device),
            do_sample=False,
            max_new_tokens=limit,
        )
    return [_up_to_stop(row, policy.stop_ids) for row in written[:, longest:].tolist()]


def _up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    end = next((place for place, token in enumerate(ids, 1) if token in stop_ids), len(ids))
    return tuple(ids[:end])
