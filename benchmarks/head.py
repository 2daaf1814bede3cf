"""Time and peak memory of the language-model head, forward and backward with a frozen head, beside other methods.

    python benchmarks/head.py                                    # one shape: --tokens --hidden --vocabulary --dtype
    python benchmarks/head.py --memory                           # peak memory over vocabularies, in fresh processes
    python benchmarks/head.py --rounding                         # what products stored in bf16 do to the results
    python benchmarks/head.py --write docs/measurements.md       # times at the shapes of Qwen2.5-Math-1.5B and 7B
    python benchmarks/head.py --memory --write docs/measurements.md   # memory, table and plot

The methods are the two bare products, tile by tile (the lower bound); naive logits with log_softmax and entropy; ours;
and, where requirements-bench.txt is installed, the functions that TRL 1.16 and Liger 0.8.5 train with (Liger's has no
entropy). Times are medians of 5, with all methods in turn in one process. Memory is the peak resident memory of a fresh
process beyond the inputs and the gradient that it returns; on a GPU, it is the allocator's peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hapo_lite.head import token_logprobs  # noqa: E402
from hapo_lite.head.shape import TILES  # noqa: E402

REPEATS = 5
MODELS = {"Qwen2.5-Math-1.5B": (1536, 151_936), "Qwen2.5-Math-7B": (3584, 152_064)}
VOCABULARIES = (32_000, 64_000, 128_000, 262_144)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Way = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""(hidden, weight, targets) -> the gradient of hidden; None where the method computes none."""


class Inputs(NamedTuple):
    """hidden: [N, D]; weight: [V, D]; targets: [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Shape:
    """The size of one measurement: N tokens, hidden size D, vocabulary V."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: str

    def inputs(self) -> Inputs:
        """Random inputs of this size, the same at every call."""
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        hidden = torch.randn(self.tokens, self.hidden, device=DEVICE).to(dtype)
        weight = torch.empty(self.vocabulary, self.hidden, dtype=dtype, device=DEVICE).normal_(std=self.hidden**-0.5)
        return Inputs(hidden, weight, torch.randint(self.vocabulary, (self.tokens,), device=DEVICE))


def bare(hidden: Tensor, weight: Tensor, _: Tensor) -> None:
    rows, columns = TILES[DEVICE]
    logits = hidden.new_empty(rows, columns)
    for tokens in hidden.split(rows):
        total = torch.zeros_like(tokens)
        for tile in weight.split(columns):
            out = logits.view(-1)[: len(tokens) * len(tile)].view(len(tokens), len(tile))
            torch.mm(tokens, tile.T, out=out)
            total.addmm_(out, tile)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor | None:
    states = hidden.detach().requires_grad_()
    logp = (states @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        -(logp.exp() * logp).sum(-1)
    logp.gather(1, targets[:, None]).sum().backward()
    return states.grad


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor | None:
    states = hidden.detach().requires_grad_()
    token_logprobs(states, weight, targets)[0].sum().backward()
    return states.grad


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor | None:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    states = hidden.detach().requires_grad_()
    logp, *_ = _ChunkedLogProbFunction.apply(
        states, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
    )
    logp.sum().backward()
    return states.grad


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor | None:
    from liger_kernel.chunked_loss import fused_linear_ppo

    states = hidden.detach().requires_grad_()
    chunk = fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    fused_linear_ppo._ChunkedSelectiveLogProbFunction.apply(states, weight, targets, None, 1.0, chunk).sum().backward()
    return states.grad


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {"bare": bare, "naive": naive, "ours": ours}
    if importlib.util.find_spec("trl"):
        found["TRL"] = trl
    if importlib.util.find_spec("liger_kernel"):
        found["Liger"] = liger
    return found


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def times(shape: Shape) -> dict[str, float]:
    """Median seconds of each method."""
    tensors = shape.inputs()
    seconds: dict[str, list[float]] = {name: [] for name in ways()}
    for way in ways().values():
        way(*tensors)
    for _ in range(REPEATS):
        for name, way in ways().items():
            _wait()
            start = time.perf_counter()
            way(*tensors)
            _wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak(name: str, shape: Shape) -> float:
    """MiB at the peak of one method beyond its inputs and the gradient it returns; meant for a fresh process."""
    tensors = shape.inputs()
    # The first product starts the libraries, whose own memory is not counted.
    torch.mm(tensors.hidden[:1], tensors.weight[:1].T)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # This resets VmHWM, which also starts anew with a new program, unlike ru_maxrss.
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    gradient = ways()[name](*tensors)
    returned = 0 if gradient is None else gradient.nbytes
    return (_peak_bytes() - before - returned) / 2**20


def _peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def peaks(shape: Shape) -> dict[str, float]:
    """MiB at the peak of each method, each in a fresh process."""
    found = {}
    for name in ways():
        command = [sys.executable, __file__, "--way", name, "--dtype", shape.dtype, "--tokens", str(shape.tokens)]
        command += ["--hidden", str(shape.hidden), "--vocabulary", str(shape.vocabulary)]
        found[name] = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return found


def time_table(shapes: list[Shape]) -> list[str]:
    """Measure the times, print them as they come, and return the lines of the table."""
    names = list(ways())
    lines = [f"| N | D | V | dtype | {' | '.join(names)} | ours / bare | TRL / ours | Liger / ours |"]
    lines.append("|---" * (len(names) + 7) + "|")
    print(*lines, sep="\n", flush=True)
    for shape in shapes:
        found = times(shape)
        cells = [str(shape.tokens), str(shape.hidden), str(shape.vocabulary), shape.dtype]
        cells += [f"{found[name]:.3g}" for name in names]
        cells.append(f"{found['ours'] / found['bare']:.2f}")
        cells += [f"{found[peer] / found['ours']:.2f}" if peer in found else "" for peer in ("TRL", "Liger")]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def memory_table(shapes: list[Shape]) -> tuple[list[str], list[dict[str, float]]]:
    """Measure the peaks and print them as they come: (the lines of the table, MiB by method for each shape)."""
    names = [name for name in ways() if name != "bare"]
    lines = [f"| N | D | V | dtype | {' | '.join(names)} | N x D in fp32 |", "|---" * (len(names) + 5) + "|"]
    rows = []
    print(*lines, sep="\n", flush=True)
    for shape in shapes:
        rows.append(peaks(shape))
        cells = [str(shape.tokens), str(shape.hidden), str(shape.vocabulary), shape.dtype]
        cells += [f"{rows[-1][name]:.0f}" for name in names] + [f"{shape.tokens * shape.hidden * 4 / 2**20:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, rows


def rounding(shape: Shape) -> None:
    """Print how far bf16 products of bf16 inputs are from fp32 products of them, for uniformly drawn targets."""
    hidden, weight, targets = Shape(shape.tokens, shape.hidden, shape.vocabulary, "bfloat16").inputs()
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        states = hidden.to(dtype, copy=True).requires_grad_()
        logp, entropy = token_logprobs(states, weight.to(dtype), targets)
        [gradient] = torch.autograd.grad(logp.sum(), states)
        results.append((logp.detach(), entropy, gradient.float()))
    (logp, entropy, gradient), (exact_logp, exact_entropy, exact_gradient) = results
    print(f"log-probability, largest difference: {float((logp - exact_logp).abs().max()):.1e} nats")
    print(f"entropy, largest relative difference: {float((entropy / exact_entropy - 1).abs().max()):.1e}")
    off = float((gradient - exact_gradient).norm() / exact_gradient.norm())
    print(f"gradient, relative norm of the difference: {off:.1e}")


def plot(rows: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for name, marker in (("naive", "s"), ("TRL", "^"), ("Liger", "D"), ("ours", "o")):
        if name in rows[0]:
            axes.plot(VOCABULARIES, [row[name] for row in rows], marker=marker, label=name)
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("extra memory at the peak, MiB")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def write_times(path: Path) -> None:
    """Write the times at both models' shapes between their markers in `path`."""
    shapes = [
        Shape(tokens, *size, dtype)
        for size in MODELS.values()
        for dtype in ("float32", "bfloat16")
        for tokens in (512, 128)
    ]
    _put_between(path, "head times", time_table(shapes))


def write_memory(path: Path) -> None:
    """Write the peaks over vocabularies and at both models' shapes between their markers in `path`, with a plot."""
    sizes = [Shape(512, 1536, vocabulary, "float32") for vocabulary in VOCABULARIES]
    large = [Shape(2048, hidden, vocabulary, "bfloat16") for hidden, vocabulary in MODELS.values()]
    table, rows = memory_table(sizes + large)
    image = path.parent / "images" / "head_memory.png"
    plot(rows[: len(sizes)], image)
    caption = "Peak memory against vocabulary, 512 tokens, hidden size 1,536, fp32"
    _put_between(path, "head memory", [*table, "", f"![{caption}](images/{image.name})"])


def _put_between(path: Path, name: str, lines: list[str]) -> None:
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    text = "\n".join([f"torch {torch.__version__}, {platform.machine()}, {device}.", "", *lines])
    before, rest = path.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->\n")
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->\n{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounding", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file with the markers for it")
    parser.add_argument("--way", choices=tuple(ways()), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(options.tokens, options.hidden, options.vocabulary, options.dtype)
    if options.way:
        print(peak(options.way, shape))
    elif options.write and options.memory:
        write_memory(options.write)
    elif options.write:
        write_times(options.write)
    elif options.rounding:
        rounding(shape)
    elif options.memory:
        memory_table([Shape(shape.tokens, shape.hidden, size, shape.dtype) for size in VOCABULARIES])
    else:
        time_table([shape])


if __name__ == "__main__":
    main()
