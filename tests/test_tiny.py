"""The bundled task and model: honest splits, right solutions, and a mixture of strategies worth choosing from."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hapo_lite.model.load import load_policy
from hapo_lite.model.origins import TINY_MODEL
from hapo_lite.recipe import LoraSettings, ModelSettings
from hapo_lite.records import EncodedPrompt, Prompt, Request
from hapo_lite.rollout.draws import DrawKey, Stage
from hapo_lite.rollout.sampling import AdaptiveTemperature
from hapo_lite.rollout.transformers_engine import TransformersEngine
from hapo_lite.tiny import build, bundled
from hapo_lite.tiny.task import Habits, Problem, all_problems, problems, worked_out, write_solution


def boxed(text: str) -> str | None:
    found = re.search(r"\\boxed\{(-?\d+)\}$", text)
    return found and found[1]


def test_answers_are_those_of_arithmetic():
    for problem in all_problems():
        assert problem.answer == eval(problem.prompt.removesuffix("=?")) >= 0


def test_train_and_test_share_no_problem():
    train, test = ({p.prompt for p in problems(split)} for split in ("train", "test"))
    assert not train & test and len(train) > 10_000 and len(test) > 1_500
    with pytest.raises(ValueError, match="'train' and 'test'"):
        problems("dev")


@pytest.mark.parametrize("form", ["a+b*c", "b*c+a", "a-b*c"])
def test_careful_students_are_right_and_hasty_ones_are_not(form):
    problem, rng = Problem(form, 97, 7, 8), random.Random(0)
    careful = Habits(guess=0.0, add_first=0.0, skip=0.0)
    solution = write_solution(problem, careful, rng)
    assert boxed(solution) == str(problem.answer) and "7*8=56" in solution
    hasty = write_solution(problem, replace(careful, add_first=1.0), rng)
    assert boxed(hasty) not in (None, str(problem.answer))
    assert boxed(write_solution(problem, replace(careful, guess=1.0, slip=1.0), rng)) != str(problem.answer)


def test_the_bundled_model_mixes_strategies_of_which_the_careful_one_is_right():
    policy = load_policy(ModelSettings(name="tiny", lora=LoraSettings(rank=1, alpha=1.0)), 0, "cpu")
    chosen = problems("test")[:100]
    prompts = [
        EncodedPrompt(
            i, Prompt(str(i), (), str(p.answer)), tuple(policy.encode([{"role": "user", "content": p.prompt}]))
        )
        for i, p in enumerate(chosen)
    ]
    requests = [Request(prompt, g) for prompt in prompts for g in range(4)]
    completions = TransformersEngine(policy, 512, 32).sample(
        requests, AdaptiveTemperature(None), DrawKey(0, Stage.TRAINING, 0)
    )
    right = [boxed(c.text) == c.prompt.prompt.answer for c in completions]
    careful = [
        ok
        for ok, c in zip(right, completions, strict=True)
        if ", then" in c.text and f" {chosen[c.prompt.index].b}*{chosen[c.prompt.index].c}=" in c.text.split(",")[0]
    ]
    assert 0.25 <= sum(right) / len(right) <= 0.45
    assert len(careful) > 80 and sum(careful) / len(careful) >= 0.95


def test_the_tokenizer_writes_any_text():
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    text = "naïve 数学 \U0001f600\n\t<b> \\boxed{12}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "1+2*3=?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+2*3=?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokenizer_is_read_as_it_was_saved():
    """By the type of the model transformers would take it for Qwen2's, which splits ` 7` and cuts up `\\boxed{`."""
    saved = Tokenizer.from_file(str(TINY_MODEL / "tokenizer.json"))
    policy = load_policy(ModelSettings(name="tiny", quantization="none", lora=LoraSettings(rank=4)), 0, "cpu")
    for problem in problems("train")[:50]:
        text = worked_out(problem)
        assert policy.encode_answer(text, policy.end_of_turn)[:-1] == saved.encode(text).ids


@pytest.mark.parametrize(("task", "name"), [("arithmetic", "tiny"), ("sums", "tiny_sums")])
def test_the_bundled_models_imitate_the_students_of_today(task, name):
    """Students who changed, or text that is written otherwise, need new weights: `python -m hapo_lite.tiny.build`.

    A model that was trained on what they write expects every token as often as it comes, within five standard
    deviations, since it did not learn everything well. Most habits that move by 0.1 take some token beyond that.
    """
    folder = bundled.MODELS[name]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    lesson, rng = build.LESSONS[task], random.Random(0)
    rows = [(p.prompt, lesson.write(p, 1.0, rng)) for p in rng.choices(lesson.problems("test", 0), k=1000)]
    batch = build.encode_batch(tokenizer, rows)
    with torch.no_grad():
        expected = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].softmax(-1)
    written = batch["labels"][:, 1:]
    expected, written = expected[written != -100], written[written != -100]
    count, mean = torch.bincount(written, minlength=expected.shape[1]), expected.sum(0)
    frequent = mean > 20
    deviations = (count - mean) / (expected * (1 - expected)).sum(0).sqrt()
    assert deviations[frequent].abs().max() < 5


def test_the_script_that_makes_the_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build", str(tmp_path), "--steps", "2", "--batch", "4"])
    build.main()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    bundled = AutoModelForCausalLM.from_pretrained(TINY_MODEL)
    assert model.config.to_diff_dict() == bundled.config.to_diff_dict()
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == AutoTokenizer.from_pretrained(TINY_MODEL).get_vocab()
