"""Prompts and completions of the run itself, and what a model makes of them.

Axes: T tokens of one completion.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hapo_lite.errors import UserError
from hapo_lite.export.source import Source
from hapo_lite.model.policy import Policy
from hapo_lite.records import Sequences, pad
from hapo_lite.runs.trace import salvage_traces
from hapo_lite.tasks.data import load_prompts

TEXTS, TEXT_TOKENS = 32, 256
"""Completions that are scored, and how far into each."""
AT_ONCE = 8
"""Texts in one forward."""
PROMPTS, ANSWER_TOKENS = 8, 64
"""Prompts that are answered greedily, and for how long."""

WIDENED = "hapo_lite_widened"
"""Set on a layer whose weights are widened while it is called."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a prompt and of its completion."""


@dataclass(frozen=True)
class Probes:
    """texts: completions of the run's newest traces; prompts: ids of the first of its data."""

    texts: tuple[Text, ...]
    prompts: tuple[tuple[int, ...], ...]


def gather(source: Source, policy: Policy, say: Callable[[str], None]) -> Probes:
    """Raises UserError where the run has left neither traces nor data that can still be read."""
    texts: list[Text] = []
    size = policy.model.get_base_model().get_output_embeddings().weight.shape[0]
    for file in sorted(source.folder.traces.glob("[0-9]*.jsonl"), reverse=True):
        for trace in salvage_traces(file).traces:
            prompt = policy.encode([{"role": role, "content": content} for role, content in trace.messages])
            ids = trace.tokens["id"][: min(TEXT_TOKENS, policy.context - len(prompt))]
            if ids and max(ids) < size:
                texts.append((tuple(prompt), tuple(ids)))
        if len(texts) >= TEXTS:
            break
    prompts = _of_data(source, policy, say) or list(dict.fromkeys(prompt for prompt, _ in texts))
    if not prompts:
        raise UserError(
            f"{source.folder.path} has no traces and its data ({source.recipe.data.source}) cannot be read: there is "
            "nothing to compare the merged model on"
        )
    return Probes(tuple(texts[:TEXTS]), tuple(prompts[:PROMPTS]))


def _of_data(source: Source, policy: Policy, say: Callable[[str], None]) -> list[tuple[int, ...]]:
    data = source.recipe.data
    try:
        found = load_prompts(data.model_copy(update={"limit": PROMPTS}))
    except UserError as error:
        say(f"note: the run's data are not there to be answered, its traces' prompts are: {error}")
        return []
    encoded = [tuple(policy.encode(prompt.chat())) for prompt in found.prompts]
    return [ids for ids in encoded if len(ids) + ANSWER_TOKENS <= policy.context]


def compute_in_fp32(policy: Policy) -> Policy:
    """The same model, each layer with 16-bit weights working in fp32, its weights widened while it does.

    In bf16 the rounding of activations alone moves log-probabilities by more than merging does (docs/export.md).
    """
    for module in policy.model.modules():
        narrow = [p for p in module.parameters(recurse=False) if p.dtype in (torch.bfloat16, torch.float16)]
        if narrow:
            _widen_while_called(module, narrow)
            setattr(module, WIDENED, True)
    return replace(policy, dtype=torch.float32)


def _widen_while_called(module: nn.Module, narrow: Sequence[nn.Parameter]) -> None:
    held = contextlib.ExitStack()
    module.register_forward_pre_hook(lambda *_: held.enter_context(_widened(narrow)) and None)
    module.register_forward_hook(lambda *_: held.close(), always_call=True)


@contextlib.contextmanager
def _widened(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """In fp32, and afterwards the very tensors that they were."""
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
    """Log-probability of every completion token, one text after the other, fp64 on the CPU; nats."""
    rows = []
    head = policy.model.get_base_model().get_output_embeddings()
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        ids = [torch.tensor([*prompt, *completion]) for prompt, completion in some]
        lengths = torch.tensor([len(completion) for _, completion in some])
        batch = Sequences(
            pad(ids, policy.device),
            torch.tensor([len(prompt) for prompt, _ in some]).to(policy.device),
            lengths.to(policy.device),
            (torch.arange(int(lengths.max()))[None] < lengths[:, None]).to(policy.device),
        )
        # The product with the head is made from its weight, without calling it.
        with _widened([head.weight]) if hasattr(head, WIDENED) else contextlib.nullcontext():
            rows.append(policy.completion_logprobs(batch)[0][batch.mask].double().cpu())
    return torch.cat(rows)


def answers(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Greedy completions, stop token included, in one batch padded on the left: the same for every model compared."""
    longest = max(len(ids) for ids in prompts)
    pad = policy.tokenizer.pad_token_id
    given = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts], device=policy.device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=policy.device)
    limit = min(ANSWER_TOKENS, policy.context - longest)
    with policy.sampling() as model:
        written = model.generate(input_ids=given, attention_mask=mask, do_sample=False, max_new_tokens=limit)
    return [_up_to_stop(row, policy.stop_ids) for row in written[:, longest:].tolist()]


def _up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> tuple[int, ...]:
    end = next((place for place, token in enumerate(ids, 1) if token in stop_ids), len(ids))
    return tuple(ids[:end])
