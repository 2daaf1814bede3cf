"""The table of a trace's tokens: readable text, and every quantity that HAPO computes for a token.

Axes: T completion tokens. `hapo_lite.algo` computes the quantities from the numbers in the trace.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import assign_credit
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.surrogate import Moves, surrogate_gain
from hapo_lite.algo.tokens import TokenSignals, fit_signal, trained_tokens
from hapo_lite.runs.trace import Trace

LONGEST_SHOWN = 120
"""Characters of one token that the page shows. The CSV keeps them all."""
WIDEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character, and so the number of tokens that one character may take."""
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SHOWN = {" ": "·", "\n": "↵\n", "\t": "⇥"}
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
"""Unicode categories whose characters are invisible, so they are shown by their code."""


@dataclass(frozen=True)
class Quantity:
    """A quantity that can colour the tokens. centre: the middle of a diverging scale; None for a sequential scale.

    names: those of the categories that the values 0, 1, ... stand for; empty for a number.
    """

    label: str
    meaning: str
    axis: Literal["linear", "log"] = "linear"
    centre: float | None = None
    names: tuple[str, ...] = ()

    def show(self, value: float) -> str:
        """A value as the page shows it: a number with four significant digits, or the name of the category."""
        return self.names[int(value)] if self.names else show_number(value)


STOPS = ("none", "lower bound", "upper bound", "dual clip", "masked", "no credit")
"""What stopped a token's gradient. The order is that of the codes in `TokenTable.numbers["stopped"]`."""


QUANTITIES: dict[str, Quantity] = {
    "entropy": Quantity("Entropy, nats", "Uncertainty of the next token at the base temperature (Eq. 5)", "log"),
    "h": Quantity("h", "Log-entropy relative to its pivot: 1 most uncertain, -1 most certain (Eq. 6)", centre=0.0),
    "percentile": Quantity("Entropy percentile", "Tokens of this generation that are no more uncertain, in %"),
    "temperature": Quantity("Temperature", "Sampling temperature of the token (Eq. 8)"),
    "temperature_move": Quantity(
        "Temperature move, %", "How far Eq. 8 moved the temperature from its base", centre=0.0
    ),
    "lower": Quantity("Lower bound", "Below this ratio, the gradient of a token with A < 0 stops (Eq. 12)"),
    "upper": Quantity("Upper bound", "Above this ratio, the gradient of a token with A > 0 stops (Eq. 13)"),
    "measure": Quantity(
        "What the bounds hold", "GSPO: the completion's ratio; DPPO: 1 + new less old probability", centre=1.0
    ),
    "logp": Quantity("Log-prob, nats", "Log-probability of the token at the base temperature"),
    "surprise": Quantity(
        "Surprisal less entropy, nats",
        "How much less likely the token was than the model's own choices are on average: above 0 a surprise, below 0 "
        "what the model preferred",
        centre=0.0,
    ),
    "weight": Quantity(
        "Advantage weight",
        "By how much the method multiplies the completion's advantage for this token: credit after, divided by before "
        "(Eq. 10-11); below 1 it learns less from the token, above 1 more",
        centre=1.0,
    ),
    "ratio": Quantity("Ratio", "Probability at the update, divided by that under the old policy", "log", centre=1.0),
    "advantage": Quantity(
        "Credit before", "Advantage of the whole completion, the same for all its tokens (Eq. 9)", centre=0.0
    ),
    "credit": Quantity(
        "Credit after",
        "Advantage of this token after redistribution (Eq. 10-11): above 0 it is to become likelier, below 0 less "
        "likely, at 0 it has no gradient",
        centre=0.0,
    ),
    "stopped": Quantity(
        "Gradient stopped by",
        "The ratio left its bounds (Eq. 12-13), the loss reached the dual clip, or the token takes no part in the loss",
        names=STOPS,
    ),
    "gap": Quantity(
        "Trainer less sampler, nats",
        "Log-probability under the trainer, less that under the sampler, at the base temperature: 0 unless they round "
        "or remember differently",
        centre=0.0,
    ),
    "kl_base": Quantity("KL to the base, nats", "Divergence from the model without its adapter", "log"),
}


@dataclass(frozen=True)
class Piece:
    """One token's text. raw: the decoded text. shown: the same with whitespace and control characters made visible.

    part: "2/3" for the second of three tokens that make up one character; "" for any other token.
    """

    raw: str
    shown: str
    special: bool = False
    part: str = ""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one completion. pieces, clipped, alternatives and each list in `numbers` have one entry per token.

    clipped: "low" or "high" for the bound that stopped the gradient, else "". alternatives: (text, probability at the
    base temperature, probability at the token's own temperature), most probable first. signal_from: a clause that says
    which tokens the signal was fitted on.
    """

    pieces: list[Piece]
    numbers: dict[str, list[float]]
    clipped: list[str]
    alternatives: list[list[tuple[str, float, float]]]
    signal: EntropySignal
    signal_from: str
    base_temperature: float

    def __len__(self) -> int:
        return len(self.pieces)

    def tensor(self, name: str) -> Tensor:
        """One quantity as [1, T], fp32."""
        return torch.tensor([self.numbers[name]])


def token_table(
    trace: Trace,
    method: Method | None = None,
    base_temperature: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TokenTable:
    """The table of a trace's tokens. Quantities that the trace does not hold are computed from its entropies.

    method: None for HAPO's defaults. tokenizer: None if there is none, which leaves the texts of the trace.
    """
    method = method or Method()
    entropy = _column(trace, "entropy")
    signal, signal_from = _signal(trace, entropy, method)
    signals = TokenSignals.of_one(method, signal, torch.tensor(entropy))
    h = _column(trace, "h") if "h" in trace.tokens else signals.h[0].tolist()
    temperature = _column(trace, "temperature")
    at_one = assign_credit(method, torch.ones(1), signals, torch.ones(1, len(h)))
    stored: dict[str, list[float]] = {
        name: _column(trace, name)
        for name in ("lower", "upper", "ratio", "advantage", "credit", "logp_old", "kl_base", "measure")
        if name in trace.tokens
    }
    logp = stored.get("logp_old") or _column(trace, "logp_base")
    numbers = {
        "entropy": entropy,
        "h": h,
        "percentile": percentiles(entropy),
        "temperature": temperature,
        "temperature_move": [100.0 * (t / base_temperature - 1.0) for t in temperature],
        "lower": stored.get("lower", at_one.lower[0].tolist()),
        "upper": stored.get("upper", at_one.upper[0].tolist()),
        "logp": logp,
        "surprise": [-p - e for p, e in zip(logp, entropy, strict=True)],
        "weight": _weights(stored, at_one.advantage[0].tolist()),
    }
    numbers |= {name: stored[name] for name in ("ratio", "measure", "advantage", "credit") if name in stored}
    if "credit" in stored and "clipped" in trace.tokens:
        # Which tokens were drawn at random is not recorded: those that lost an advantage were not.
        drawn = [c != 0.0 or a == 0.0 for c, a in zip(stored["credit"], stored["advantage"], strict=True)]
        trained = trained_tokens(method, signals.uncertain, trace.truncated, torch.tensor([drawn]))
        # CISPO's bound limits the weight of a token and stops no gradient.
        clipped = trace.tokens["clipped"] if method.surrogate != "cispo" else [""] * len(h)
        numbers["stopped"] = _stops(stored["credit"], clipped, trained[0].tolist())
    if "logp_old" in stored:
        numbers["gap"] = [old - base for old, base in zip(logp, _column(trace, "logp_base"), strict=True)]
    numbers |= {name: stored[name] for name in ("kl_base",) if name in stored}
    return TokenTable(
        pieces=token_pieces(trace.tokens["id"], trace.tokens["text"], tokenizer),
        numbers=numbers,
        clipped=trace.tokens.get("clipped", [""] * len(entropy)),
        alternatives=trace.tokens.get("alternatives", [[] for _ in entropy]),
        signal=signal,
        signal_from=signal_from,
        base_temperature=base_temperature,
    )


def percentiles(values: Sequence[float]) -> list[float]:
    """For each value, the percentage of `values` that are no larger."""
    sample = torch.tensor(values, dtype=torch.float64)
    return (100.0 * torch.searchsorted(sample.sort().values, sample, right=True).double() / len(values)).tolist()


def token_pieces(
    ids: Sequence[int], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Piece]:
    """The text of each token. With a tokenizer, the first of several tokens that make up a character shows it whole."""
    if tokenizer is None:
        return [Piece(text, visible(text), special=_looks_special(text)) for text in texts]
    special = set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    while len(pieces) < len(ids):
        start = len(pieces)
        count, text = _whole_character(ids, start, tokenizer)
        is_special = ids[start] in special
        if count == 1:
            pieces.append(Piece(text, visible(text), is_special))
            continue
        pieces.append(Piece(text, visible(text), part=f"1/{count}"))
        pieces += [Piece("", "‥", part=f"{i}/{count} of {visible(text)}") for i in range(2, count + 1)]
    return pieces


@functools.lru_cache(maxsize=4096)
def visible(text: str, longest: int = LONGEST_SHOWN) -> str:
    """Text as the page shows it: whitespace, control and direction marks become visible, and long text is cut."""
    cut = text[:longest]
    drawn = "".join(_SHOWN.get(c) or (_code(c) if unicodedata.category(c) in _UNSEEN else c) for c in cut)
    if len(text) > longest:
        drawn += f"… ({len(text):,} characters)"
    return drawn or "∅"


def show_number(value: float) -> str:
    """A number with four significant digits, as the page shows it."""
    return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else str(value)


@dataclass(frozen=True)
class WhatIf:
    """The credit and the bounds of every token under an assumed ratio, [T] each.

    clipped: "low" or "high" for the bound that stops the token's gradient, else "".
    """

    credit: list[float]
    lower: list[float]
    upper: list[float]
    clipped: list[str]


def what_if(table: TokenTable, method: Method, ratio: float, advantage: float) -> WhatIf:
    """The outcome if every token had the ratio `ratio` and the completion the advantage `advantage` (Eq. 10-13)."""
    h = table.tensor("h")
    ratios = torch.full_like(h, ratio)
    signals = TokenSignals.of_one(method, table.signal, table.tensor("entropy")[0])
    credit = assign_credit(method, torch.tensor([advantage]), signals, ratios)
    gain = surrogate_gain(method, Moves(ratios.log(), table.tensor("logp"), h.isfinite()), credit)
    flags = zip(gain.stopped_low[0].tolist(), gain.stopped_high[0].tolist(), strict=True)
    return WhatIf(
        credit=credit.advantage[0].tolist(),
        lower=credit.lower[0].tolist(),
        upper=credit.upper[0].tolist(),
        clipped=["low" if low else "high" if high else "" for low, high in flags],
    )


TREATED = ("amplified", "suppressed", "clipped low", "clipped high")


def treated_tokens(trace: Trace) -> dict[str, list[int]]:
    """The positions of the tokens of each treatment in TREATED; {} if the completion took part in no update."""
    if not {"credit", "advantage", "clipped"} <= trace.tokens.keys():
        return {}
    credit, advantage = (np.abs(trace.tokens[name]) for name in ("credit", "advantage"))
    clipped = np.array(trace.tokens["clipped"])
    tests = (credit > advantage, credit < advantage, clipped == "low", clipped == "high")
    return {name: np.flatnonzero(test).tolist() for name, test in zip(TREATED, tests, strict=True)}


@dataclass(frozen=True)
class DualWord:
    """A word that occurs on both sides of the pivot. entropies: that of every occurrence, nats, ascending."""

    word: str
    entropies: list[float]


def dual_entropy(tables: Sequence[TokenTable], most: int = 20) -> list[DualWord]:
    """Words that occur both with h > 0 and with h <= 0. Those with the widest range of log-entropy come first."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        for piece, entropy, h in zip(table.pieces, table.numbers["entropy"], table.numbers["h"], strict=True):
            word = piece.raw.strip()
            if word and not piece.special and not piece.part:
                seen.setdefault(word, []).append((entropy, h))
    words = []
    for word, occurrences in seen.items():
        if any(h > 0 for _, h in occurrences) and any(h <= 0 for _, h in occurrences):
            words.append(DualWord(word, sorted(entropy for entropy, _ in occurrences)))
    floor = tables[0].signal.floor if tables else 1.0
    words.sort(key=lambda w: math.log(max(w.entropies[0], floor)) - math.log(max(w.entropies[-1], floor)))
    return words[:most]


def csv_text(table: TokenTable) -> str:
    """The table as CSV in full precision. Text is quoted as JSON, so that `=1+1` is no formula in a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["position", "text", *table.numbers, "clipped", "alternatives"])
    for i, piece in enumerate(table.pieces):
        row = [repr(values[i]) for values in table.numbers.values()]
        alternatives = json.dumps(table.alternatives[i], ensure_ascii=False) if table.alternatives[i] else ""
        writer.writerow([i, json.dumps(piece.raw, ensure_ascii=False), *row, table.clipped[i], alternatives])
    return out.getvalue()


def _column(trace: Trace, name: str) -> list[float]:
    return [float(v) for v in trace.tokens[name]]


def _signal(trace: Trace, entropy: list[float], method: Method) -> tuple[EntropySignal, str]:
    """The signal for a trace's h, and the clause of `TokenTable.signal_from`."""
    if trace.signal is not None:
        return trace.signal, f"the signal of iteration {trace.iteration}, over all its completion tokens"
    if trace.sampling_signal is not None:
        return trace.sampling_signal, "the signal that set the temperatures, fitted before this generation"
    return fit_signal(method, torch.tensor(entropy)), "a signal fitted on this generation alone"


def _weights(stored: dict[str, list[float]], at_one: list[float]) -> list[float]:
    """credit / advantage if the completion had an advantage in its update, else `at_one`, the weight at ratio 1."""
    if any(stored.get("advantage", [])) and "credit" in stored:
        return [c / a for c, a in zip(stored["credit"], stored["advantage"], strict=True)]
    return at_one


def _stops(credits: Sequence[float], clipped: Sequence[str], trained: Sequence[bool]) -> list[float]:
    """The code in STOPS of each token. The dual clip is what limits a token of negative credit from above."""
    codes = []
    for credit, clip, counts in zip(credits, clipped, trained, strict=True):
        stop = "none"
        if not counts:
            stop = "masked"
        elif credit == 0.0:
            stop = "no credit"
        elif clip == "low":
            stop = "lower bound"
        elif clip == "high":
            stop = "upper bound" if credit > 0.0 else "dual clip"
        codes.append(float(STOPS.index(stop)))
    return codes


def _whole_character(ids: Sequence[int], start: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The number of tokens from `start` on that make up a character, and their text. It is 1 if no number does."""
    alone = _decode(tokenizer, ids[start : start + 1])
    if not alone.endswith(_REPLACEMENT):
        return 1, alone
    for count in range(2, WIDEST_CHARACTER + 1):
        text = _decode(tokenizer, ids[start : start + count])
        if start + count <= len(ids) and _REPLACEMENT not in text:
            return count, text
    return 1, alone


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    # decode returns a list only for nested lists of ids.
    text = cast(str, tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    # SentencePiece drops a space at the beginning of its input, which is nearly never the beginning of the text here.
    first = tokenizer.convert_ids_to_tokens(int(ids[0]))
    lost = isinstance(first, str) and first.startswith("▁") and not text.startswith((" ", "▁"))
    return f" {text}" if lost else text


def _looks_special(text: str) -> bool:
    return text.startswith("<|") and text.endswith("|>")


def _code(character: str) -> str:
    # A zero-width joiner holds an emoji or an Indic cluster together, so it stays as it is.
    joins = character in "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
    return character if joins else f"⟨U+{ord(character):04X}⟩"
