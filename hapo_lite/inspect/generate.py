"""One generation, token by token, sampled as the trainer samples it, with the alternatives to each token.

Axes: V vocabulary. The signal is that of an opened run, or it is fitted on a first pass. The first pass has the same
prompt and the same random numbers at the base temperature, so only the adaptive temperature makes the passes differ.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import fit_signal
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import ModelSettings
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn
from hapo_lite.rollout.transformers_engine import TransformersEngine, Watch
from hapo_lite.runs.trace import Trace

ALTERNATIVES = 10
"""Alternatives that are recorded for each token."""
MOST_TOKENS = 4096
MOST_SECONDS = 600.0
LOOK_SECONDS = 0.25
"""Time between two looks at a generation. Each look costs about as much as a token of a small model."""
OUT_OF_TIME = "stopped at the time limit"

NAMES = ("id", "text", "logp_sampling", "logp_base", "entropy", "temperature", "alternatives")
Tokens = dict[str, list[Any]]
"""A list for each of NAMES, [T], as in `Trace.tokens`."""


@dataclass(frozen=True)
class GenerationSettings:
    """The inputs of one generation, except the model.

    signal: that of a run; None fits one on a first pass. seconds: the time limit. system_prompt: None for no system
    message, which a template may treat otherwise than an empty one. Raises UserError for a value that is out of range.
    """

    problem: str
    method: Method = field(default_factory=Method)
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    seconds: float = 120.0
    signal: EntropySignal | None = None
    system_prompt: str | None = None

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The chat as (role, content) pairs: the system prompt, if any, and the problem."""
        system = [] if self.system_prompt is None else [("system", self.system_prompt)]
        return [*system, ("user", self.problem)]

    def __post_init__(self) -> None:
        if not self.problem.strip():
            raise UserError("there is no problem to solve: type one or pick an example")
        if not 0.0 < self.temperature <= 10.0:
            raise UserError(f"temperature = {self.temperature:g} is out of range: it must lie above 0 and up to 10")
        if not 1 <= self.max_new_tokens <= MOST_TOKENS:
            raise UserError(f"max tokens = {self.max_new_tokens} is out of range: 1 to {MOST_TOKENS:,}")
        if not 0.0 < self.seconds <= MOST_SECONDS:
            raise UserError(f"time limit = {self.seconds:g} s is out of range: up to {MOST_SECONDS:g} s")
        if self.seed < 0:
            raise UserError(f"seed = {self.seed} is out of range: it must not be negative")


@dataclass(frozen=True)
class Progress:
    """A generation after one more token.

    first_pass: the pass at the base temperature, which the signal is fitted on. ended: a clause that says why the
    generation ended; "" while it runs.
    """

    trace: Trace
    first_pass: bool
    ended: str = ""


@dataclass(frozen=True)
class _Job:
    """One generation. limit: the longest completion, tokens. deadline: a time of `time.monotonic`."""

    policy: Policy
    settings: GenerationSettings
    request: Request
    limit: int
    deadline: float


def generate(policy: Policy, settings: GenerationSettings) -> Iterator[Progress]:
    """Write one completion, token by token. The last item holds the whole completion. Closing the iterator cancels.

    Without the adaptive temperature there is only one pass. Raises UserError if the prompt does not fit the model.
    """
    prompt = Prompt("prompt", tuple(settings.messages), answer="")
    ids = policy.encode(prompt.chat())
    room = policy.context - len(ids)
    if room < 1:
        raise UserError(f"the problem has {len(ids):,} tokens; the model takes {policy.context:,} in all")
    request = Request(EncodedPrompt(0, prompt, tuple(ids)), sample=0)
    deadline = time.monotonic() + settings.seconds
    job = _Job(policy, settings, request, min(settings.max_new_tokens, room), deadline)
    with policy.unpacked():
        if settings.method.adaptive_temperature and settings.signal is None:
            yield from _two_passes(job)
        else:
            yield from _one_pass(job, settings.signal)


def _two_passes(job: _Job) -> Iterator[Progress]:
    """A first pass at the base temperature, and then the completion under the signal of the first pass."""
    entropy: list[float] = []
    for progress in _one_pass(job, None):
        if progress.ended == OUT_OF_TIME:
            yield Progress(progress.trace, True, f"{OUT_OF_TIME}, before the adaptive temperature could be used")
            return
        if not progress.ended:
            yield Progress(progress.trace, first_pass=True)
        entropy = progress.trace.tokens["entropy"]
    yield from _one_pass(job, fit_signal(job.settings.method, torch.tensor(entropy)))


def _one_pass(job: _Job, signal: EntropySignal | None) -> Iterator[Progress]:
    """One completion, token by token, written by the engine. signal: None for the base temperature."""
    policy = job.policy
    settings = job.settings
    adaptive = signal if settings.method.adaptive_temperature else None
    processor = AdaptiveTemperature(adaptive, settings.temperature, settings.method.tau)
    tokens: Tokens = {name: [] for name in NAMES}
    drawn: list[Tensor] = []
    watch = Watch(
        job.limit,
        min(LOOK_SECONDS, settings.seconds),
        lambda logits, token: drawn.append(_columns(token, logits.float() / settings.temperature)),
    )
    engine = TransformersEngine(policy, batch_size=1, max_new_tokens=job.limit)
    for _ in engine.stream([job.request], processor, DrawKey(settings.seed, Stage.TRAINING, 0), watch):
        # All tokens since the last look come to the host at once.
        fresh = torch.stack(drawn).tolist()
        drawn.clear()
        for columns in fresh:
            for name, value in _token(policy, columns).items():
                tokens[name].append(value)
            ended = _reason_to_end(job, tokens["id"])
            yield Progress(_trace(job, tokens, signal, ended), False, ended)
            if ended:
                return


def _reason_to_end(job: _Job, ids: list[int]) -> str:
    """The clause of `Progress.ended` after the tokens `ids`."""
    if ids[-1] in job.policy.stop_ids:
        return "ended by itself"
    if len(ids) == job.limit:
        return "cut off at the token limit"
    return OUT_OF_TIME if time.monotonic() > job.deadline else ""


def _columns(drawn: Drawn, base: Tensor) -> Tensor:
    """The numbers of one token and its alternatives, on the model's device: [7, 1 + A], fp64, in which ids are exact.

    drawn: one row. base: [1, V], the logits at the base temperature. The rows are ids, log-probabilities at the token's
    own temperature and at the base temperature, probabilities at both, entropy and temperature.
    """
    base_logp = torch.log_softmax(base[0].double(), dim=-1)
    own_logp = torch.log_softmax(drawn.scores[0].double(), dim=-1)
    best = base_logp.topk(min(ALTERNATIVES, base_logp.shape[0])).indices
    shown = torch.cat([drawn.ids, best])
    logps = torch.stack([own_logp[shown], base_logp[shown]])
    of_token = torch.stack([drawn.entropy, drawn.temperature]).double().expand(-1, len(shown))
    return torch.cat([shown.double()[None], logps, logps.exp(), of_token])


def _token(policy: Policy, columns: list[list[float]]) -> dict[str, Any]:
    """One token with its alternatives, a value for each of NAMES. columns: those of `_columns`."""
    ids, (own, *_), (at_base, *_), own_shares, base_shares, (entropy, *_), (temperature, *_) = columns
    texts = policy.tokenizer.batch_decode([[int(i)] for i in ids], skip_special_tokens=False)
    return {
        "id": int(ids[0]),
        "text": texts[0],
        "logp_sampling": own,
        "logp_base": at_base,
        "entropy": entropy,
        "temperature": temperature,
        "alternatives": list(zip(texts[1:], base_shares[1:], own_shares[1:], strict=True)),
    }


def _trace(job: _Job, tokens: Tokens, signal: EntropySignal | None, ended: str) -> Trace:
    """The completion so far. Until it ends it shares the lists of `tokens` and has no text.

    Decoding and copying at every token would take quadratic time.
    """
    return Trace(
        stage="inspect",
        iteration=0,
        prompt_id="prompt",
        sample=0,
        messages=job.settings.messages,
        gold="",
        text=job.policy.decode(tokens["id"]) if ended else "",
        reward=0.0,
        outcome="",
        truncated=bool(ended) and tokens["id"][-1] not in job.policy.stop_ids,
        tokens={name: list(values) for name, values in tokens.items()} if ended else tokens,
        sampling_signal=signal,
    )


OF_RUN = ("revision", "chat_template_options", "chat_template_date")
"""The settings of a run's model on which its prompts depend, besides the name."""


class ModelShelf:
    """The last few models that were loaded. All pages share them, since a loaded model is only read."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self._held: OrderedDict[tuple[str, str], Policy] = OrderedDict()

    def get(
        self,
        name: str,
        adapter: str = "",
        quantization: Literal["none", "nf4"] = "none",
        run: ModelSettings | None = None,
    ) -> Policy:
        """The model `name` (hub name, folder or `tiny`). adapter: a folder; "" for none. Raises UserError.

        run: the model of a run. If it is the same model, prompts are rendered as in that run.
        """
        name, adapter = name.strip(), adapter.strip()
        if not name:
            raise UserError("there is no model: type a hub name or a folder, or `tiny` for the bundled one")
        settings = ModelSettings(name=name, quantization=quantization)
        if run is not None and run.name == settings.name:
            settings = settings.model_copy(update=run.model_dump(include=set(OF_RUN)))
        key = (adapter, settings.model_dump_json())
        if key not in self._held:
            while len(self._held) >= self.keep:
                self._held.popitem(last=False)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            policy = load_policy(settings, 0, device, adapter=Path(adapter) if adapter else None)
            policy.model.eval()  # here it only samples, and need not be put into this state and out of it
            self._held[key] = policy
        self._held.move_to_end(key)
        return self._held[key]
