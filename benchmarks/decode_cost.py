"""What a decoding step costs in the default engine: operators, bytes over the least possible, waits.

    python benchmarks/decode_cost.py                   # a small model with Qwen's proportions; 1.5B, 7B, 8B by shape
    python benchmarks/decode_cost.py --by-name         # also the bytes and calls of the largest operators

Nothing is timed. The small model is run, as on a device that the host waits for. A step reaches from one call of the
model to the next, and the counts are means over 16 steps in which no row ends. Operators are the calls of torch's
dispatcher that compute or copy; views count nothing. Bytes are what those operators read and write, an operator's own
traffic inside caches and registers left out. A wait is a place where the host needs a number that the device has: a
look at a value, an index of booleans, a copy to the host.

The large models are tensors without data in bf16, with an adapter of rank 32, at 128 rows of 1,024 tokens. They compute
as on a GPU, where a product of 16-bit factors has an fp32 result. "grows" is the cache that transformers makes, with
peft's adapter and repeated keys: the way of models that the fixed cache does not cover.

The least possible: every weight once, the cache of the rows' tokens once, and the logits written once and read twice
(their sum must be known before a token can be drawn).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from peft import LoraConfig, get_peft_model  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AttentionMaskInterface,
    AutoTokenizer,
    DynamicCache,
    Qwen2ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

from benchmarks.shapes import LLAMA_8B, QWEN_1_5B, QWEN_7B, Shape  # noqa: E402
from hapo_lite.algo.signal import EntropySignal  # noqa: E402
from hapo_lite.head.product import Product  # noqa: E402
from hapo_lite.model.lora import TwoProducts, held_factors, use_two_products  # noqa: E402
from hapo_lite.model.origins import TINY_MODEL  # noqa: E402
from hapo_lite.model.policy import Policy, trainers_head  # noqa: E402
from hapo_lite.recipe import LoraSettings, ModelSettings  # noqa: E402
from hapo_lite.records import EncodedPrompt, Prompt, Request  # noqa: E402
from hapo_lite.rollout import decoding  # noqa: E402
from hapo_lite.rollout.cache import FixedCache  # noqa: E402
from hapo_lite.rollout.decoding import LOOK_EVERY, Decoder, Writing  # noqa: E402
from hapo_lite.rollout.draws import DrawKey, Stage  # noqa: E402
from hapo_lite.rollout.forward import FixedForward, Forward, GrowingForward, read_prompts  # noqa: E402
from hapo_lite.rollout.sampling import AdaptiveTemperature  # noqa: E402
from hapo_lite.rollout.transformers_engine import TransformersEngine  # noqa: E402
from hapo_lite.train.memory.shapes import build, computing_in  # noqa: E402

FREE = {"_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "set_"}
"""Operators beside views that move no bytes."""
INTO = {"index_copy_", "index_put_", "_index_put_impl_", "index_fill_", "scatter_", "slice_scatter", "index_add_"}
"""They touch only the named part of their first argument: the bytes of their other arguments, read and written."""
FROM = {"index", "index_select", "gather", "embedding", "searchsorted"}
"""They read about as much of their first floating argument as they return."""
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
LOOKS = {"tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "item"}
"""Methods that on a CPU read a tensor without the dispatcher."""


@dataclass(frozen=True)
class Cost:
    """Counts of one step: operators, bytes read and written, and waits; means over several steps."""

    operators: float
    bytes: float
    waits: float


class Traffic(TorchDispatchMode):
    """Within it, `operators`, `bytes` and `waits` grow. by_name: bytes by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.waits = 0
        self.by_name: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._looks = _Looks(self)

    def __enter__(self) -> Traffic:
        self._looks.__enter__()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._looks.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name in WAITS or (name.startswith(("index", "_index")) and any(t.dtype == torch.bool for t in given[1:])):
            self.waits += 1
        if not (name in FREE or name in WAITS or func.namespace == "prim" or _is_view(func)):
            moved = _moved(func, name, args, given, [t for t in tree_leaves(out) if isinstance(t, Tensor)])
            self.operators += 1
            self.bytes += moved
            self.by_name[name] += moved
            self.calls[name] += 1
        return out


class _Looks(TorchFunctionMode):
    """Counts the looks at a tensor's values."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, func, types, args=(), kwargs=None):
        before = self.traffic.waits
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in LOOKS and self.traffic.waits == before:
            self.traffic.waits += 1
        return out


def _is_view(func) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _moved(func, name: str, args, given: list[Tensor], out: list[Tensor]) -> int:
    """Bytes that an operator reads and writes."""
    if name in INTO:
        return 2 * sum(extent(t) for t in given[1:])
    if name in FROM:
        return 2 * sum(extent(t) for t in out) + sum(extent(t) for t in given if t.dtype == torch.long)
    writes_only = name in {"copy_", "fill_", "zero_"}
    read = given[1:] if writes_only else given
    mutated = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    read = [t for t in read if not (mutated and mutated[0].kwarg_only and any(t is o for o in out))]
    return sum(extent(t) for t in read) + sum(extent(t) for t in out)


def extent(tensor: Tensor) -> int:
    """Bytes of a tensor's different elements: a dimension that repeats one element counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()


LARGE = {"1.5B": QWEN_1_5B, "7B": QWEN_7B, "8B": LLAMA_8B}
ROWS, PROMPT, TOKENS, RANK = 128, 256, 1024, 32
"""For the large shapes: rows, tokens of a prompt, tokens of a row at the step that is counted; the adapter's rank."""
SMALL = Shape(layers=4, hidden=192, heads=12, key_heads=2, inner=1120, vocabulary=18_992)
"""Qwen2.5-1.5B over eight, with 4 layers in place of 28."""


def small_policy(dtype: torch.dtype, rank: int = 8) -> Policy:
    """A policy of the small shape with random weights, unquantised, with an adapter on every linear layer."""
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(SMALL.config()).to(dtype)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", lora_dropout=0.0))
    use_two_products(model)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL, padding_side="left")
    return Policy(model, tokenizer, (SMALL.vocabulary - 1,), 4096, dtype)


def requests_of(rows: int, length: int) -> list[Request]:
    """Requests for `rows` completions of two prompts, one of which is a quarter shorter than `length` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (length, length - length // 4)
    ids = [tuple(torch.randint(1, 300, (n,), generator=generator).tolist()) for n in lengths]
    prompts = [EncodedPrompt(i, Prompt(str(i), (("user", ""),), "0"), row) for i, row in enumerate(ids)]
    return [Request(prompts[i % 2], i // 2) for i in range(rows)]


@contextlib.contextmanager
def marked(policy: Policy, traffic: Traffic) -> Iterator[list[tuple[int, int, int]]]:
    """A context that yields a list of the counts at each call of the model."""
    marks: list[tuple[int, int, int]] = []
    handle = policy.base.register_forward_pre_hook(
        lambda *_: marks.append((traffic.operators, traffic.bytes, traffic.waits))
    )
    try:
        yield marks
    finally:
        handle.remove()


def run_cost(policy: Policy, rows: int = 16, prompt: int = 48, first: int = 9, steps: int = 16) -> Cost:
    """The mean cost of `steps` steps of the engine from step `first` on, of rows that all go on."""
    engine = TransformersEngine(policy, rows, first + steps + 1)
    traffic = Traffic()
    with mock.patch.object(decoding, "looks_of", lambda device: LOOK_EVERY), traffic, marked(policy, traffic) as marks:
        engine.sample(requests_of(rows, prompt), AdaptiveTemperature(None), DrawKey(0, Stage.BENCHMARK, 0))
    operators, moved, waits = ((b - a) / steps for a, b in zip(marks[first], marks[first + steps], strict=True))
    return Cost(operators, moved, waits)


def product_of_a_gpu(weight: torch.dtype, result: torch.dtype, device: str) -> Product:
    """`Product.of` as on CUDA: the product is stored in fp32, and not by tiles in 16 bits."""
    return Product(weight, result, rounds=False)


def shape_cost(shape: Shape, grows: bool = False, traffic: Traffic | None = None) -> Cost:
    """The cost of one step by shapes alone. grows: with the cache of transformers and the adapter of peft."""
    traffic, mode = traffic or Traffic(), FakeTensorMode()
    settings = ModelSettings(name="", quantization="none", lora=LoraSettings(rank=RANK, alpha=2 * RANK))
    model = build(settings, shape.config(), torch.bfloat16, mode).eval()
    base = model.get_base_model()
    if grows:
        keep_pefts_forward(model)
    adapter = held_factors(model, torch.bfloat16)
    head = mock.patch.object(Product, "of", product_of_a_gpu)
    with mode, torch.no_grad(), computing_in(torch.bfloat16, "cuda"), trainers_head(base), head, adapter:
        rows = torch.zeros(ROWS, dtype=torch.long)
        mask = torch.ones(1, PROMPT, dtype=torch.long)
        cache = DynamicCache(config=base.config)
        read_prompts(model, mask, mask, cache)
        forward: Forward
        if grows:
            base.set_attn_implementation(REPEATED)
            forward = GrowingForward(base, cache, rows, mask)
            forward.attention_mask = mask.new_ones(ROWS, TOKENS - 1)
            for layer in cache.layers:
                kept = (*layer.keys.shape[:2], TOKENS - 1, layer.keys.shape[3])
                layer.keys, layer.values = layer.keys.new_empty(kept), layer.keys.new_empty(kept)
        else:
            fixed = FixedCache(cache, rows, mask, TOKENS)
            fixed.width = TOKENS - 1
            forward = FixedForward(base, fixed)
        draws = torch.empty(TOKENS, ROWS, dtype=torch.float64)
        signal = EntropySignal(pivot=0.0, sigma=1.0, high=1.0, low=1.0)
        decoder = Decoder(Writing(AdaptiveTemperature(signal), draws, rows[:1]), rows[:, None])
        with forward.reading():
            decoder.step(forward)  # what is made at the first call is made
            forward.prepare(ROWS)
            with traffic:
                decoder.choose(ROWS, forward.logits(decoder.rows.tokens, decoder.rows.position))
    return Cost(traffic.operators, traffic.bytes, traffic.waits + 1 / LOOK_EVERY)


def keep_pefts_forward(model: nn.Module) -> None:
    """Undo `use_two_products`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), TwoProducts):
            del vars(module)["forward"]


def _repeated(module, query, key, value, attention_mask, **options):
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _mask(batch_size: int, q_length: int, kv_length: int, **options) -> Tensor:
    return torch.empty(batch_size, 1, int(q_length), int(kv_length), dtype=torch.bool)


REPEATED = "decode_cost_repeated"
"""The attention of transformers, with a mask that is made without its look at the padding, one wait a step."""
AttentionInterface.register(REPEATED, _repeated)
AttentionMaskInterface.register(REPEATED, _mask)


def least_bytes(shape: Shape, rows: int, length: int, itemsize: int, rank: int) -> int:
    """The bytes that a step must move, with rows of `length` tokens and an unquantised base."""
    head = shape.hidden // shape.heads
    kv = shape.key_heads * head
    pairs = [(shape.hidden, shape.hidden)] * 2 + [(shape.hidden, kv)] * 2 + [(shape.hidden, shape.inner)] * 3
    layer = sum(a * b + rank * (a + b) for a, b in pairs)
    weights = shape.layers * layer + shape.hidden * shape.vocabulary
    cache = 2 * shape.layers * rows * kv * length
    return itemsize * (weights + cache) + 3 * 4 * rows * shape.vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--by-name", action="store_true", help="also the bytes of each operator")
    arguments = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    cost = run_cost(small_policy(dtype), arguments.rows)
    least = least_bytes(SMALL, arguments.rows, 48 + 9 + 8, dtype.itemsize, 8)
    print(f"{'':16}{'operators':>10}{'GB':>10}{'/ least':>9}{'waits':>7}")
    line(f"small, {arguments.dtype}", cost, least)
    for name, shape in LARGE.items():
        least = least_bytes(shape, ROWS, TOKENS, 2, RANK)
        for way in ("grows", "fixed"):
            traffic = Traffic()
            line(f"{name}, {way}", shape_cost(shape, way == "grows", traffic), least)
            if arguments.by_name:
                for operator, moved in traffic.by_name.most_common(12):
                    print(f"    {operator:44}{traffic.calls[operator]:6} {moved / 1e9:8.3f} GB")


def line(name: str, cost: Cost, least: int) -> None:
    print(f"{name:16}{cost.operators:10,.0f}{cost.bytes / 1e9:10.3f}{cost.bytes / least:9.2f}{cost.waits:7.2f}")


if __name__ == "__main__":
    main()
