"""Time and peak memory of the language-model head, forward and backward with a frozen head, beside other ways.

    python benchmarks/head.py [--tokens 512] [--hidden 1536] [--vocabulary 151936] [--dtype float32] [--trl] [--memory]

Rows: the two bare products, tile by tile (the lower bound); naive logits with log_softmax and entropy; ours; and with
--trl the function that TRL 1.16 trains with. All in turn in one process, medians of 5. --memory measures instead the
peak resident memory that each way adds, in a fresh process each.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from hapo_lite.head import TILES, token_logprobs

REPEATS = 5
Way = Callable[[Tensor, Tensor, Tensor], object]


def bare(hidden: Tensor, weight: Tensor, _: Tensor) -> None:
    rows, columns = TILES["cpu"]
    logits = hidden.new_empty(rows, columns)
    for tokens in hidden.split(rows):
        total = torch.zeros_like(tokens)
        for tile in weight.split(columns):
            out = logits.view(-1)[: len(tokens) * len(tile)].view(len(tokens), len(tile))
            torch.mm(tokens, tile.T, out=out)
            total.addmm_(out, tile)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    states = hidden.clone().requires_grad_()
    logp = (states @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        -(logp.exp() * logp).sum(-1)
    logp.gather(1, targets[:, None]).sum().backward()


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    token_logprobs(hidden.clone().requires_grad_(), weight, targets)[0].sum().backward()


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    states = hidden.clone().requires_grad_()
    logp, *_ = _ChunkedLogProbFunction.apply(
        states, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    logp.sum().backward()


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.hidden).to(dtype)
    weight = torch.empty(options.vocabulary, options.hidden, dtype=dtype).normal_(std=options.hidden**-0.5)
    return hidden, weight, torch.randint(options.vocabulary, (options.tokens,))


def times(ways: dict[str, Way], options: argparse.Namespace) -> None:
    tensors = inputs(options)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(*tensors)
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.perf_counter()
            way(*tensors)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| | seconds | / bare |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.2f} | {value / medians['bare']:.2f} |")


def memory(ways: dict[str, Way], options: argparse.Namespace) -> None:
    print("| | extra MiB at the peak |\n|---|---|")
    for name in ways:
        result = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", name], capture_output=True, text=True, check=True
        )
        print(f"| {name} | {result.stdout.strip()} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--trl", action="store_true", help="needs pip install trl==1.16.0")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    ways: dict[str, Way] = {"bare": bare, "naive": naive, "ours": ours} | ({"trl": trl} if options.trl else {})
    if options.way:
        tensors = inputs(options)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ways[options.way](*tensors)
        print(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    else:
        (memory if options.memory else times)(ways, options)


if __name__ == "__main__":
    main()
