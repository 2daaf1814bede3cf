"""Traces made up for the inspector's tests, and hostile texts to put into them."""

from __future__ import annotations

import dataclasses
import re

import torch

from hapo_lite.algo.methods import Method
from hapo_lite.algo.objective import assign_credit
from hapo_lite.algo.tokens import TokenSignals, fit_signal
from hapo_lite.runs.trace import Trace

ENTROPIES = [1.2, 0.3, 1e-4, 0.02, 2.0, 1e-6]
HOSTILE = ["<script>alert(1)</script>", "</script>", '" onmouseover="alert(1)', "'`${1}`{{x}}", "</div><b>", "&lt;"]


def make_trace(texts=("a", " b", "c", "d", " a", "."), entropy=ENTROPIES, **fields) -> Trace:
    count = len(texts)
    tokens = {
        "id": list(range(count)),
        "text": list(texts),
        "logp_sampling": [-0.5] * count,
        "logp_base": [-0.25 * (i + 1) for i in range(count)],
        "entropy": list(entropy)[:count],
        "temperature": [1.0] * count,
    }
    plain = {"stage": "eval", "iteration": 3, "prompt_id": "p", "sample": 0, "messages": [["user", "why?"]]}
    plain |= {"gold": "1", "text": "".join(texts), "reward": 0.0, "outcome": "wrong", "truncated": False}
    return Trace(**{**plain, "tokens": tokens, **fields})


def trained(trace: Trace, method: Method, advantage: float, ratio: list[float]) -> Trace:
    """The trace with what an update would have recorded."""
    entropy = torch.tensor(trace.tokens["entropy"])
    signal = fit_signal(method, entropy)
    tokens = TokenSignals.of_one(method, signal, entropy)
    credit = assign_credit(method, torch.tensor([advantage]), tokens, torch.tensor([ratio]))
    update = {
        "logp_old": trace.tokens["logp_base"],
        "h": tokens.h[0].tolist(),
        "ratio": ratio,
        "advantage": [advantage] * len(ratio),
        "credit": credit.advantage[0].tolist(),
        "lower": credit.lower[0].tolist(),
        "upper": credit.upper[0].tolist(),
        "clipped": ["low" if r < 0.7 else "" for r in ratio],
        "kl_base": [0.25 * i for i in range(len(ratio))],
    }
    return dataclasses.replace(trace, stage="train", tokens=trace.tokens | update, signal=signal)


def strip_known(page: str) -> str:
    """The page without the tags that the inspector itself writes."""
    known = "section|div|span|label|select|option|button|aside|p|i|wbr|figure|figcaption|article|header|b"
    known += "|table|thead|tbody|tr|th|td"
    return re.sub(rf"</?(?:{known})(?: [a-z-]+(?:=\"[^\"]*\")?)*>", "", page)
