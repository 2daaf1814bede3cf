"""One generation, token by token: what the trainer's sampler does to each token, with the alternatives it had.

Axes: V vocabulary. The signal is that of the run that was opened, or is fitted on a first pass over the same prompt at
the base temperature with the same random numbers, so that the two passes differ by the adaptive temperature alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hapo_lite.algo.methods import Method
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.tokens import fit_signal
from hapo_lite.errors import UserError
from hapo_lite.model.load import load_policy
from hapo_lite.model.policy import Policy
from hapo_lite.recipe import ModelSettings
from hapo_lite.rollout.draws import DrawKey, Stage, uniforms
from hapo_lite.rollout.sampling import AdaptiveTemperature, Drawn, draw
from hapo_lite.runs.trace import Trace

ALTERNATIVES = 10
MOST_TOKENS = 4096
MOST_SECONDS = 600.0


@dataclass(frozen=True)
class GenerationSettings:
    """What one generation depends on, apart from the model. signal: of a run; None fits one on a first pass."""

    problem: str
    method: Method = field(default_factory=Method)
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0
    seconds: float = 120.0
    signal: EntropySignal | None = None
    system_prompt: str = ""

    @property
    def messages(self) -> list[tuple[str, str]]:
        """The chat, as data sets give it: a system prompt, if any, and the problem."""
        system = [("system", self.system_prompt)] if self.system_prompt else []
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
    """Where a generation stands after a token. first_pass: it is the plain one, which the signal is fitted on.

    ended: "" while it runs, then why it ended, as a clause.
    """

    trace: Trace
    first_pass: bool
    ended: str = ""


def generate(policy: Policy, settings: GenerationSettings) -> Iterator[Progress]:
    """Write one completion, token by token; the last item holds it whole. Closing the iterator cancels.

    Without the adaptive temperature the first pass is all there is. Raises UserError on a prompt that does not fit.
    """
    prompt = policy.encode([{"role": role, "content": content} for role, content in settings.messages])
    room = policy.context - len(prompt)
    if room < 1:
        raise UserError(f"the problem has {len(prompt):,} tokens; the model takes {policy.context:,} in all")
    limit = min(settings.max_new_tokens, room)
    draws = uniforms(DrawKey(settings.seed, Stage.TRAINING, iteration=0), prompt=0, sample=0, count=limit)
    deadline = time.monotonic() + settings.seconds
    with policy.unpacked():
        yield from _passes(policy, settings, prompt, draws, deadline)


def _passes(
    policy: Policy, settings: GenerationSettings, prompt: list[int], draws: Tensor, deadline: float
) -> Iterator[Progress]:
    signal = settings.signal
    if settings.method.adaptive_temperature and signal is None:
        last = None
        for last in _one_pass(policy, settings, prompt, draws, None, deadline):
            if not last.ended:
                yield Progress(last.trace, first_pass=True)
        assert last is not None
        if last.ended == _OUT_OF_TIME:
            yield Progress(last.trace, True, f"{last.ended}, before the adaptive temperature could be used")
            return
        signal = fit_signal(settings.method, torch.tensor(last.trace.tokens["entropy"]))
    yield from _one_pass(policy, settings, prompt, draws, signal, deadline)


_OUT_OF_TIME = "stopped at the time limit"


def _one_pass(
    policy: Policy,
    settings: GenerationSettings,
    prompt: list[int],
    draws: Tensor,
    signal: EntropySignal | None,
    deadline: float,
) -> Iterator[Progress]:
    method = settings.method
    processor = AdaptiveTemperature(signal if method.adaptive_temperature else None, settings.temperature, method.tau)
    names = ("id", "text", "logp_sampling", "logp_base", "entropy", "temperature", "alternatives")
    tokens: dict[str, list] = {name: [] for name in names}
    inputs, cache, ended = torch.tensor([prompt], device=policy.device), None, ""
    for step in range(len(draws)):
        # Entered anew for each token: while the iterator waits at its yield, nobody else may be left without gradients.
        with policy.sampling() as model:
            out = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits, cache = out.logits[:, -1], out.past_key_values
            drawn = draw(processor, logits, draws[step : step + 1].to(logits.device))
            _record(tokens, policy, drawn, logits.float() / settings.temperature)
        inputs = drawn.ids[:, None]
        if int(drawn.ids) in policy.stop_ids:
            ended = "ended by itself"
        elif step + 1 == len(draws):
            ended = "cut off at the token limit"
        elif time.monotonic() > deadline:
            ended = _OUT_OF_TIME
        yield Progress(_trace(policy, settings, tokens, signal, ended), False, ended)
        if ended:
            return


def _record(tokens: dict[str, list], policy: Policy, drawn: Drawn, base: Tensor) -> None:
    """Add one token and its alternatives. drawn: one row; base: [1, V], the logits at the base temperature."""
    chosen = int(drawn.ids)
    base_logp, own_logp = (torch.log_softmax(z[0].double(), dim=-1) for z in (base, drawn.scores))
    best = base_logp.topk(min(ALTERNATIVES, base_logp.shape[0])).indices
    texts = policy.tokenizer.batch_decode([[i] for i in [chosen, *best.tolist()]], skip_special_tokens=False)
    tokens["id"].append(chosen)
    tokens["text"].append(texts[0])
    tokens["logp_sampling"].append(float(own_logp[chosen]))
    tokens["logp_base"].append(float(base_logp[chosen]))
    tokens["entropy"].append(float(drawn.entropy))
    tokens["temperature"].append(float(drawn.temperature))
    tokens["alternatives"].append(
        list(zip(texts[1:], base_logp[best].exp().tolist(), own_logp[best].exp().tolist(), strict=True))
    )


def _trace(
    policy: Policy, settings: GenerationSettings, tokens: dict[str, list], signal: EntropySignal | None, ended: str
) -> Trace:
    return Trace(
        stage="inspect",
        iteration=0,
        prompt_id="prompt",
        sample=0,
        messages=settings.messages,
        gold="",
        # Decoding everything again at every token would make a long generation quadratic.
        text=policy.decode(tokens["id"]) if ended else "",
        reward=0.0,
        outcome="",
        truncated=bool(ended) and tokens["id"][-1] not in policy.stop_ids,
        tokens={name: list(values) for name, values in tokens.items()} if ended else tokens,
        sampling_signal=signal,
    )


class ModelShelf:
    """The last few models that were loaded, for all pages together; a loaded model is only read."""

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep
        self._held: OrderedDict[tuple[str, str, str], Policy] = OrderedDict()

    def get(self, name: str, adapter: str = "", quantization: str = "none") -> Policy:
        """The model `name` (hub name, folder or `tiny`), with the adapter in a folder, if any. Raises UserError."""
        key = (name.strip(), adapter.strip(), quantization)
        if not key[0]:
            raise UserError("there is no model: type a hub name or a folder, or `tiny` for the bundled one")
        if key not in self._held:
            while len(self._held) >= self.keep:
                self._held.popitem(last=False)
            settings = ModelSettings(name=key[0], quantization=quantization)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._held[key] = load_policy(settings, 0, device, adapter=Path(key[1]) if key[1] else None)
        self._held.move_to_end(key)
        return self._held[key]
