"""The comparison of `make verl-smoke` accepts what the plug-in makes of a batch, and finds what is not the kit's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.verl_smoke.check import METHOD, Batch, checks, forward
from hapo_lite import load_policy
from hapo_lite.integrations import verl
from hapo_lite.records import pad
from hapo_lite.tiny.task import problems, worked_out

STEPS = ([0, 1, 2, 3], [4, 5, 6, 7])


@pytest.fixture
def policy(make_recipe):
    return load_policy(make_recipe("model.quantization=none").model, seed=0, device="cpu")


@pytest.fixture
def folder(policy, tmp_path):
    """The records of one iteration: two problems, four completions each, two steps, two processes."""
    record = {name: [] for name in ("uid", "prompts", "responses", "rm_scores")}
    for row in range(8):
        problem = problems("train")[row // 4]
        answer = worked_out(problem) if row % 2 else rf"Clearly \boxed{{{row}}}"
        ids = torch.tensor([*policy.tokenizer.encode(answer), policy.stop_ids[0]])
        record["uid"].append(f"group {row // 4}")
        record["prompts"].append(torch.tensor(policy.encode([{"role": "user", "content": problem.prompt}])))
        record["responses"].append(ids)
        record["rm_scores"].append(torch.nn.functional.one_hot(torch.tensor(len(ids) - 1), len(ids)) * (row % 2))
    lengths = [len(ids) for ids in record["responses"]]
    batch = Batch(
        [torch.cat(pair) for pair in zip(record["prompts"], record["responses"], strict=True)],
        torch.tensor([len(ids) for ids in record["prompts"]]),
        torch.tensor(lengths),
        torch.tensor([row % 2 for row in range(8)]).double(),
        torch.tensor([row // 4 for row in range(8)]),
        {},
    )

    def rows(values):
        return [row[:n].float() for row, n in zip(values, lengths, strict=True)]

    old = forward(policy, batch, None)
    record |= {"old_log_probs": rows(old.logp), "rollout_log_probs": rows(old.sampled), "entropy": rows(old.entropy)}
    batch.verl["entropy"] = pad(record["entropy"]).double()
    spread = batch.advantage[:, None] * batch.mask
    record |= {"hapo_h": rows(batch.h), "advantages": rows(spread)}
    torch.save(record, tmp_path / "iteration-1.pt")
    torch.manual_seed(0)
    moved = old.logp + 0.3 * torch.randn(old.logp.shape)
    for number, step in enumerate(STEPS):
        tokens = sum(lengths[row] for row in step)
        for process, part in enumerate((step[:2], step[2:])):
            config = SimpleNamespace(
                clip_ratio_low=METHOD.eps_low,
                clip_ratio_high=METHOD.eps_high,
                clip_ratio_c=METHOD.dual_clip,
                global_batch_info={"dp_size": 2, "batch_num_tokens": tokens},
            )
            with verl.token_signals(batch.h[part]):
                loss, _ = verl.clipped_loss(
                    METHOD, old.logp[part], moved[part], spread[part], batch.mask[part], "token-mean", config
                )
            written = {"rows": part, "log_probs": [moved[row, : lengths[row]] for row in part], "loss": float(loss)}
            torch.save({**written, "tokens": tokens, "processes": 2}, tmp_path / f"loss-{number:03d}-{process}.pt")
    return tmp_path


def test_the_plug_ins_numbers_pass(policy, folder):
    found = list(checks(folder, [policy]))
    assert [check.what for check in found if not check.passed] == []
    assert [check.what.split(": ")[1] for check in found].count("loss") == len(STEPS)
    assert any("0 of" not in check.note for check in found if check.what.endswith("loss"))


@pytest.mark.parametrize(
    ("name", "field", "what"),
    [
        ("iteration-1.pt", "hapo_h", "h"),
        ("iteration-1.pt", "advantages", "advantage"),
        ("iteration-1.pt", "rollout_log_probs", "sampled log-probability"),
        ("loss-001-1.pt", "loss", "loss"),
    ],
)
def test_a_number_that_is_not_the_kits_is_found(policy, folder, name, field, what):
    record = torch.load(folder / name, weights_only=True)
    record[field] = [row + 0.01 for row in record[field]] if field != "loss" else record[field] + 0.01
    torch.save(record, folder / name)
    assert [check.what for check in checks(folder, [policy]) if not check.passed] == [f"iteration 1: {what}"]
