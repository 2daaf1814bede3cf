"""Builds a bundled model: `python -m hapo_lite.tiny.build OUT [--task sums]` (about 20 minutes on 2 cores, seeded).

A model of the Qwen2 architecture with 0.8 M parameters learns, from random weights, to imitate the students of a task,
`task.py` or `sums.py`. At first all solutions are careful; their fraction falls to its final value early, so that the
model knows the careful strategy exactly when the others come in. The learning rate decays to zero until the end.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hapo_lite.tiny import sums, task

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Each digit is a token, as in Qwen's tokenizer; a space belongs to the piece behind it; `\boxed{` stays whole.
PIECES = r"\\boxed\{| ?\p{L}+| ?\p{N}| \\boxed\{| ?[^\s\p{L}\p{N}]|\s+"


@dataclass(frozen=True)
class Lesson:
    """What a bundled model learns to imitate.

    problems: the problems of a split, shuffled by a seed. write: a solution of a problem, by students as they are when
    this share of them is as careless as in the end.
    """

    problems: Callable[[str, int], Sequence[Any]]
    write: Callable[[Any, float, random.Random], str]


def _arithmetic(problem: task.Problem, careless: float, rng: random.Random) -> str:
    end = task.Habits()
    habits = task.Habits(end.guess * careless, end.add_first * careless, end.skip * careless, end.slip)
    return task.write_solution(problem, habits, rng)


def _sums(problem: sums.Sum, careless: float, rng: random.Random) -> str:
    end = sums.Patience()
    patience = sums.Patience(0.5 + (end.subtract - 0.5) * careless, end.give_up * careless)
    return sums.write_solution(problem, patience, rng)


LESSONS = {"arithmetic": Lesson(task.problems, _arithmetic), "sums": Lesson(sums.problems, _sums)}


def build_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over all 256 bytes: it encodes any text, and each word of the task as a single token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        padding_side="left",
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A model with random weights: 3 layers of width 128, 4 heads on 2 key-value heads, tied embeddings."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=math.ceil(len(tokenizer) / 64) * 64,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id], pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode_batch(tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The model's inputs for (prompt, solution) pairs: input_ids, attention_mask and labels.

    All are [B, T] and right-padded; the labels of prompts and padding are -100.
    """
    ids = []
    labels = []
    for prompt, solution in rows:
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        head_ids = tokenizer.encode(head, add_special_tokens=False)
        tail_ids = [*tokenizer.encode(solution, add_special_tokens=False), tokenizer.eos_token_id]
        ids.append(torch.tensor(head_ids + tail_ids))
        labels.append(torch.tensor([-100] * len(head_ids) + tail_ids))
    lengths = torch.tensor([len(row) for row in ids])
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
    return {
        "input_ids": padded,
        "attention_mask": mask,
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }


@dataclass(frozen=True)
class Schedule:
    """steps: optimiser steps; batch: solutions of a step; seed: of problems and solutions."""

    steps: int
    batch: int
    seed: int


def train(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, lesson: Lesson, schedule: Schedule) -> None:
    """Train the model to predict the next token of solutions that are written anew for every batch."""
    rng = random.Random(schedule.seed)
    pool = lesson.problems("train", schedule.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    started = time.time()
    for step in range(schedule.steps):
        progress = step / schedule.steps
        careless = min(1.0, max(0.0, (progress - 0.2) / 0.2))
        lr = 2e-3 * min(1.0, step / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = [(p.prompt, lesson.write(p, careless, rng)) for p in rng.choices(pool, k=schedule.batch)]
        loss = model(**encode_batch(tokenizer, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == schedule.steps - 1:
            print(f"step {step} loss {loss.item():.4f} lr {lr:.2e} {time.time() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model and tokenizer to")
    parser.add_argument("--task", choices=sorted(LESSONS), default="arithmetic")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lesson = LESSONS[args.task]
    rng = random.Random(args.seed)
    pool = lesson.problems("train", args.seed)
    corpus = [lesson.write(p, 1.0, rng) for p in pool]
    corpus += [p.prompt for p in pool[:2000]] + ["user\n", "assistant\n", "system\n"] * 500
    tokenizer = build_tokenizer(corpus)
    model = build_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, lesson, Schedule(args.steps, args.batch, args.seed))
    # bf16 halves the file; the policy loads the weights in fp32, or in NF4, as the recipe says.
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(json.dumps({"out": str(args.out), "bytes": sum(f.stat().st_size for f in args.out.iterdir())}))


if __name__ == "__main__":
    main()
