"""The algorithm on whatever comes: groups, masks, entropies and methods at random, against plain Python."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hapo_lite.algo.advantage import FALLBACK_LIMIT, STD_FLOOR, group_advantage, redistribute
from hapo_lite.algo.methods import PRESETS, Method
from hapo_lite.algo.objective import LossInputs, assign_credit, loss_denominator, loss_weights, method_loss
from hapo_lite.algo.signal import EntropySignal
from hapo_lite.algo.temperature import adaptive_temperature
from hapo_lite.algo.tokens import TokenSignals, fit_signal, trained_tokens, uncertain_tokens

LIMIT = 9
"""Most tokens that a completion may have."""
OFTEN = settings(max_examples=150, deadline=None)

rewards = st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e-9, 1e6]) | st.floats(-10, 10)
lengths = st.sampled_from([1, 30, 2000]) | st.integers(1, 2000)
groups = st.lists(st.tuples(rewards, lengths, st.integers(0, 2)), min_size=1, max_size=12)
entropies = st.sampled_from([0.0, 1e-300, 1e-8, 1e-3, 11.9]) | st.floats(0.0, 12.0)


@st.composite
def methods(draw) -> Method:
    """A preset, or all its pieces at random."""
    method = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    if draw(st.booleans()):
        return method
    flags = ("token_level_advantage", "redistribution", "adaptive_clip", "entropy_scale")
    method = replace(
        method,
        eps_uncertain=None,
        **{name: draw(st.booleans()) for name in flags},
        low_side=draw(st.sampled_from(["negative", "positive"])),
        neutral_zone=draw(st.sampled_from(["base", "adapted"])),
        loss_average=draw(st.sampled_from(["token", "sequence", "constant"])),
        trained_tokens=draw(st.sampled_from(["all", "uncertain", "random"])),
        uncertain_among=draw(st.sampled_from(["iteration", "completion"])),
        importance=draw(st.sampled_from(["none", "truncated"])),
        quantile=draw(st.floats(0, 1)),
        eps_low=draw(st.floats(0.01, 0.49)),
        eps_high=draw(st.floats(0.01, 2.0)),
        surrogate=draw(st.sampled_from(["clip", "sequence", "cispo", "sapo", "dppo"])),
        gate_positive=draw(st.floats(0.1, 4.0)),
        gate_negative=draw(st.floats(0.1, 4.0)),
        dual_clip=draw(st.none() | st.floats(1.5, 10.0)),
        entropy_bonus=draw(st.sampled_from([0.0, 0.4])),
        kl_certain=draw(st.sampled_from([0.0, 0.1])),
        kl_uncertain=draw(st.sampled_from([0.0, 0.1])),
    )
    if not method.adaptive_clip:
        method = replace(method, eps_uncertain=draw(st.none() | st.floats(0.1, 0.9)))
    return method


@st.composite
def steps(draw) -> tuple[list[dict[str, Tensor]], Tensor]:
    """The completions of an optimiser step, [T] fp64 each, and their advantages, [B]."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0]))

    def noise(length: int) -> Tensor:
        return torch.randn(length, generator=generator, dtype=torch.float64)

    completions = []
    for length in lengths:
        old = -3.0 * noise(length).abs()
        entropy = torch.tensor(draw(st.lists(entropies, min_size=length, max_size=length)), dtype=torch.float64)
        near = {name: old + spread * noise(length) for name in ("logp", "sampling_logp", "reference_logp")}
        singled = {"drawn": noise(length) > 0, "factor": 1.0 + 0.1 * (noise(length) > 0)}
        completions.append({"old_logp": old, "entropy": entropy, **near, **singled})
    chosen = st.sampled_from([0.0, 1.0, -1.0, 0.3, -4.0])
    return completions, torch.tensor([draw(chosen) for _ in lengths], dtype=torch.float64)


def signals(method: Method, completions: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """h, uncertain and scale of each, as the loop has them."""
    signal = fit_signal(method, torch.cat([c["entropy"] for c in completions]))
    means = [c["entropy"].mean().clamp_min(method.floor) for c in completions]
    return [
        {
            "h": signal.normalize(c["entropy"]),
            "uncertain": uncertain_tokens(method, signal, c["entropy"]),
            "scale": torch.stack(means).mean() / mean,
        }
        for c, mean in zip(completions, means, strict=True)
    ]


def in_micro_batches(
    method: Method,
    completions: list[dict[str, Tensor]],
    advantage: Tensor,
    batches: list[list[int]],
    width: int = 0,
    beyond: float = 0.0,
) -> tuple[float, list[Tensor]]:
    """Loss of a step and its gradient by completion, summed over padded micro-batches. beyond: what padding holds."""
    known = signals(method, completions)
    pairs = zip(known, completions, strict=True)
    counts = [trained_tokens(method, k["uncertain"], drawn=c["drawn"]).sum() for k, c in pairs]
    denominator = loss_denominator(torch.tensor(counts), method.loss_average, LIMIT)
    total, gradients = 0.0, [torch.empty(0)] * len(completions)
    for batch in batches:
        columns = max(width, *(len(known[i]["h"]) for i in batch))
        mask = torch.arange(columns)[None] < torch.tensor([len(known[i]["h"]) for i in batch])[:, None]

        def padded(rows: list[dict[str, Tensor]], name: str, batch=batch, mask=mask) -> Tensor:
            full = torch.full(mask.shape, beyond, dtype=torch.float64)
            full[mask] = torch.cat([rows[i][name].double() for i in batch])
            return full

        uncertain = padded(known, "uncertain") == 1.0
        tokens = TokenSignals(
            padded(known, "h"),
            padded(completions, "entropy"),
            uncertain,
            torch.stack([known[i]["scale"] for i in batch]),
            padded(completions, "factor"),
            padded(completions, "drawn") == 1.0,
        )
        logp = padded(completions, "logp").requires_grad_()
        trained = trained_tokens(method, uncertain, drawn=tokens.drawn)
        loss, _ = method_loss(
            method,
            logp,
            LossInputs(
                padded(completions, "old_logp"),
                advantage[batch],
                tokens,
                loss_weights(mask, method.loss_average, trained),
                padded(completions, "sampling_logp"),
                padded(completions, "reference_logp"),
            ),
            denominator,
        )
        loss.loss.backward()
        total += float(loss.loss.detach())
        assert not bool(logp.grad[~mask].any())
        for row, i in enumerate(batch):
            gradients[i] = logp.grad[row, : len(known[i]["h"])]
    return total, gradients


def clipped(ratio: float, a: float, lower: float, upper: float, dual_clip: float | None) -> tuple[float, float]:
    """PPO's gain of one token, with the dual clip, and its derivative by the token's logp."""
    gain, slope = ratio * a, ratio * a
    if min(max(ratio, lower), upper) * a < gain:
        gain, slope = min(max(ratio, lower), upper) * a, 0.0
    if dual_clip is not None and a < 0 and gain < dual_clip * a:
        gain, slope = dual_clip * a, 0.0
    return gain, slope


def gain_of_one(m: Method, a: float, bounds: tuple[float, float], whole: float, c: dict[str, float]) -> tuple:
    """The gain of one token under the method's surrogate, and its derivative by logp. whole: its completion's ratio."""
    ratio = math.exp(c["logp"] - c["old_logp"])
    if m.surrogate == "clip":
        return clipped(ratio, a, *bounds, m.dual_clip)
    if m.surrogate == "sequence":
        return clipped(whole, a, *bounds, m.dual_clip)
    if m.surrogate == "cispo":
        return (min(ratio, bounds[1]) * a,) * 2
    if m.surrogate == "sapo":
        tau = m.gate_positive if a > 0 else m.gate_negative
        gate = 1 / (1 + math.exp(-tau * (ratio - 1))) if tau * (ratio - 1) > -700 else 0.0
        return 4 / tau * gate * a, 4 * gate * (1 - gate) * ratio * a
    change = 1 + math.exp(c["logp"]) - math.exp(c["old_logp"])
    if (a > 0 and change > bounds[1]) or (a < 0 and change < bounds[0]):
        return 0.0, 0.0
    return (min(ratio, m.dual_clip or math.inf) * a,) * 2


def is_trained(m: Method, uncertain: bool, c: dict[str, float]) -> bool:
    return {"all": True, "uncertain": uncertain, "random": bool(c["drawn"])}[m.trained_tokens]


def one_token(
    m: Method, a: float, h: float, entropy: float, uncertain: bool, whole: float, c: dict[str, float]
) -> tuple:
    """Loss of one token and its derivative by logp, in plain Python: the equations read once more, from the paper."""
    ratio = math.exp(c["logp"] - c["old_logp"])
    if m.eps_uncertain is not None and uncertain:
        lower, upper = 1 - m.eps_uncertain, 1 + m.eps_uncertain
    else:
        wider = h if m.adaptive_clip else 0.0
        lower, upper = 1 - m.eps_low * (1 - min(wider, 0.0)), 1 + m.eps_high * (1 + max(wider, 0.0))
    if m.entropy_bonus:
        a += min(m.entropy_bonus * entropy, abs(a) / m.entropy_bonus_limit)
    if m.redistribution:
        low, high = (m.eps_low, m.eps_high) if m.neutral_zone == "base" else (1 - lower, upper - 1)
        settled = 1 - low / 2 <= ratio <= 1 + high / 2
        if (h > 0 and not settled) or (h <= 0 and settled):
            a *= 1 + h
    if m.surrogate in ("cispo", "sapo"):
        lower = 0.0
    if m.surrogate == "sapo":
        upper = math.inf
    a *= c["factor"]
    if not is_trained(m, uncertain, c):
        a = 0.0
    gain, slope = gain_of_one(m, a, (lower, upper), whole, c)
    if m.importance == "truncated":
        weight = min(math.exp(c["old_logp"] - c["sampling_logp"]), m.importance_cap)
        gain, slope = gain * weight, slope * weight
    kl = (m.kl_uncertain if uncertain else m.kl_certain) if is_trained(m, uncertain, c) else 0.0
    x = c["reference_logp"] - c["logp"]
    return -(gain - kl * (math.exp(x) - x - 1)), -(slope - kl * (1 - math.exp(x)))


def in_plain_python(method: Method, completions: list[dict[str, Tensor]], advantage: Tensor) -> tuple:
    known = signals(method, completions)
    losses, slopes, counts = [], [], []
    for c, k, a in zip(completions, known, advantage.tolist(), strict=True):
        a *= float(k["scale"]) if method.entropy_scale else 1.0
        whole = math.exp(sum((c["logp"] - c["old_logp"]).tolist()) / len(c["logp"]))
        names = ("logp", "old_logp", "sampling_logp", "reference_logp", "factor", "drawn")
        tokens = [
            one_token(method, a, h, e, u, whole, {name: float(c[name][t]) for name in names})
            for t, (h, e, u) in enumerate(
                zip(k["h"].tolist(), c["entropy"].tolist(), k["uncertain"].tolist(), strict=True)
            )
        ]
        rows = zip(k["uncertain"].tolist(), c["drawn"].tolist(), strict=True)
        counts.append(sum(is_trained(method, u, {"drawn": d}) for u, d in rows))
        losses.append(sum(loss for loss, _ in tokens))
        slopes.append([slope for _, slope in tokens])
    if method.loss_average == "constant":
        weights = [1.0 / (LIMIT * len(counts))] * len(counts)
    elif method.loss_average == "token":
        weights = [1.0 / max(sum(counts), 1)] * len(counts)
    else:
        weights = [1.0 / max(count, 1) / max(sum(c > 0 for c in counts), 1) for count in counts]
    loss = sum(w * x for w, x in zip(weights, losses, strict=True))
    return loss, [[w * s for s in row] for w, row in zip(weights, slopes, strict=True)]


@OFTEN
@given(method=methods(), step=steps())
def test_any_method_is_its_equations(method, step):
    completions, advantage = step
    everyone = [list(range(len(completions)))]
    loss, gradients = in_micro_batches(method, completions, advantage, everyone)
    expected, slopes = in_plain_python(method, completions, advantage)
    # The weights of a mean over completions are fp32, so a sum that cancels is right to that.
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-6)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert gradient.tolist() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@OFTEN
@given(
    method=methods(),
    step=steps(),
    order=st.randoms(use_true_random=False),
    size=st.integers(1, 3),
    width=st.integers(0, 12),
    beyond=st.sampled_from([math.nan, math.inf, -1e300, 1.0]),
)
def test_a_step_does_not_depend_on_its_cut_its_order_or_its_padding(method, step, order, size, width, beyond):
    completions, advantage = step
    everyone = list(range(len(completions)))
    loss, gradients = in_micro_batches(method, completions, advantage, [everyone])
    order.shuffle(everyone)
    cut = [everyone[i : i + size] for i in range(0, len(everyone), size)]
    again, others = in_micro_batches(method, completions, advantage, cut, width, beyond)
    assert again == pytest.approx(loss, rel=1e-6, abs=1e-6)
    for left, right in zip(gradients, others, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-12)


@OFTEN
@given(
    group=groups,
    level=st.sampled_from(["token", "sequence"]),
    scale=st.sampled_from(["group", "batch", "none"]),
    order=st.randoms(use_true_random=False),
)
def test_advantages_of_any_groups(group, level, scale, order):
    def advantage(rows: list[tuple]) -> list[float]:
        values, lengths, ids = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
        return group_advantage(values, lengths, ids, level, scale).tolist()

    def spread(rows: list[tuple], weights: list[float], lost: int) -> float:
        """The standard deviation of the rewards in rows, about their weighted mean; lost: degrees of freedom."""
        mean = sum(w * row[0] for w, row in zip(weights, rows, strict=True)) / sum(weights)
        squares = sum(w * (row[0] - mean) ** 2 for w, row in zip(weights, rows, strict=True))
        return math.sqrt(squares / (sum(weights) - lost)) + STD_FLOOR

    found = advantage(group)
    for group_id in {row[2] for row in group}:
        members = [(r, n, a) for (r, n, g), a in zip(group, found, strict=True) if g == group_id]
        values, lengths, a = zip(*members, strict=True)
        rows = [row for row in group if row[2] == group_id]
        if scale != "batch":
            # Another group's rewards have nothing to say.
            assert a == tuple(advantage(rows))
        if len(set(values)) == 1:
            assert set(a) == {0.0}
            continue
        # Better than the mean is up, worse is down, and a better one is never below a worse one.
        ranked = [own for _, own in sorted(zip(values, a, strict=True))]
        assert ranked == sorted(ranked)
        measured = rows if scale == "group" else group
        stds = 1.0, 1.0
        if scale != "none":
            stds = spread(measured, [1.0] * len(measured), 1), spread(measured, [row[1] for row in measured], 0)
        by_sequence = [(r - sum(values) / len(values)) / stds[0] for r in values]
        mean = sum(r * n for r, n in zip(values, lengths, strict=True)) / sum(lengths)
        by_token = [(r - mean) / stds[1] for r in values]
        extreme = scale != "none" and max(map(abs, by_token)) >= FALLBACK_LIMIT
        fell_back = level == "sequence" or extreme
        assert a == pytest.approx(by_sequence if fell_back else by_token, rel=1e-6, abs=1e-6)
    shuffled = list(enumerate(group))
    order.shuffle(shuffled)
    back = dict(zip([i for i, _ in shuffled], advantage([row for _, row in shuffled]), strict=True))
    assert [back[i] for i in range(len(group))] == pytest.approx(found, rel=1e-9, abs=1e-9)


@OFTEN
@given(
    values=st.lists(entropies, min_size=1, max_size=30),
    others=st.lists(entropies, min_size=1, max_size=10),
    quantile=st.floats(0, 1),
    factor=st.floats(0.5, 2.0),
    base=st.floats(0.1, 2.0),
    tau=st.floats(0.0, 0.99),
)
def test_the_signal_of_any_entropies(values, others, quantile, factor, base, tau):
    def fit(numbers: list[float], dtype: torch.dtype = torch.float64) -> EntropySignal:
        entropy = torch.tensor(numbers, dtype=dtype)
        return EntropySignal.fit(entropy, torch.ones(len(numbers)), quantile)

    for dtype in (torch.float64, torch.float32):  # a run's entropies are in fp32
        signal = fit(values, dtype)
        everything = torch.tensor(sorted(values + others), dtype=dtype)
        h = signal.normalize(everything)
        assert h.dtype == dtype and bool(((h >= -1) & (h <= 1)).all())
        assert bool((h.diff() >= 0).all())  # more entropy is never a lower signal
        assert torch.equal(h > 0, signal.above(everything) & (signal.high > 0))
        ends = signal.normalize(torch.tensor([min(values), max(values)], dtype=dtype)).tolist()
        assert ends == [-1.0 if signal.low > 0 else 0.0, 1.0 if signal.high > 0 else 0.0]
    signal = fit(values)
    everything = torch.tensor(sorted(values + others), dtype=torch.float64)
    assert signal == fit(list(reversed(values)))
    # A constant factor on all entropies is a shift of their logarithms, of which h knows nothing.
    large = [v + 1e-3 for v in values]
    one, two = fit(large), fit([v * factor for v in large])
    scaled = torch.tensor(large, dtype=torch.float64) * factor
    left, right = one.normalize(torch.tensor(large, dtype=torch.float64)), two.normalize(scaled)
    wide = 1e-6 if min(one.high or 1.0, one.low or 1.0) > 1e-6 else 2.0
    torch.testing.assert_close(left, right, rtol=0.0, atol=wide)
    temperature = adaptive_temperature(everything, signal, base, tau)
    assert bool((temperature >= base * (1 - tau) - 1e-12).all() and (temperature <= base * (1 + tau) + 1e-12).all())
    assert bool((temperature.diff() >= 0).all())


@OFTEN
@given(
    method=methods(),
    values=st.lists(st.tuples(st.floats(-1, 1), st.floats(0.0, 5.0), st.booleans()), min_size=1, max_size=8),
    advantage=st.floats(-5, 5),
)
def test_credit_and_bounds_of_any_token(method, values, advantage):
    h, ratio, uncertain = (torch.tensor([column], dtype=torch.float64) for column in zip(*values, strict=True))
    tokens = TokenSignals(h, torch.zeros_like(h), uncertain == 1.0, torch.ones(1, dtype=torch.float64))
    credit = assign_credit(method, torch.tensor([advantage], dtype=torch.float64), tokens, ratio)
    # 1 lies between the bounds, so nothing is stopped before anything has moved; the ratio may never be asked below 0.
    assert bool(((credit.lower >= 0) & (credit.lower < 1) & (credit.upper > 1)).all())
    signs = credit.advantage * advantage
    assert bool((signs >= 0).all())  # no token is pushed the other way
    if not method.entropy_bonus:
        assert bool((credit.advantage.abs() <= 2 * abs(advantage) + 1e-9).all())
    neutral = redistribute(torch.ones_like(h), torch.zeros_like(h), ratio)
    assert bool((neutral == 1).all())


@OFTEN
@given(step=steps(), method=st.sampled_from([PRESETS["hapo"], PRESETS["hapo_public_code"]]))
def test_hapo_without_its_pieces_is_dapo_on_anything(step, method):
    off = dict.fromkeys(("adaptive_temperature", "token_level_advantage", "redistribution", "adaptive_clip"), False)
    completions, advantage = step
    batches = [[i] for i in range(len(completions))]
    loss, gradients = in_micro_batches(replace(method, **off), completions, advantage, batches)
    expected, others = in_micro_batches(PRESETS["dapo"], completions, advantage, batches)
    assert loss == expected
    assert all(torch.equal(left, right) for left, right in zip(gradients, others, strict=True))
