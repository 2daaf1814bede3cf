"""A pretended GPU: tensors that say they are on cuda:0, hold their data on the CPU, and keep the rules of CUDA.

Every operator passes through `_run`, which refuses what a card refuses, counts what a card would launch, notes where
the host would have to wait, and then computes the operator on the CPU. docs/gpu.md says what that shows and what not.

It needs a CUDA build of torch, which loads without a card. A CPU build has no index guard for a CUDA tensor.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}
"""Operators beside views that launch no kernel."""
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
"""Operators that give the host a value."""
SIZES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
"""Operators whose result has as many entries as the values say: the host waits for that number."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
"""Operators that take indices on the CPU and copy them."""
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "mv", "addmv", "dot", "_scaled_dot_product_attention_math"}
NARROW = (torch.float16, torch.bfloat16)


class Refused(RuntimeError):
    """What CUDA would refuse: tensors of two devices, or a dtype that an operator has no kernel for."""


class Watch(TorchDispatchMode):
    """A context within which tensors can be made on the pretended GPU. One is active at a time.

    kernels: launches by operator. waits: by kind. where: waits by (kind, our line, the line that asked). A kind is one
    of "value" (`item`, `bool`, `tolist`), "size" (`nonzero`, an index of booleans), "to the CPU", "to the card" and
    "synchronize".
    """

    active: Watch | None = None

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.where: Counter[tuple[str, str, str]] = Counter()

    def __enter__(self) -> Watch:
        # `torch.tensor` then makes its tensor on the CPU and copies it, through the dispatcher.
        torch._C._set_only_lift_cpu_tensors(True)
        Watch.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(False)
        if threading.current_thread() is threading.main_thread():
            Watch.active = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def in_thread(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` for another thread, since a mode belongs to the thread that has entered it."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self:
                return work(*args, **kwargs)

        return watched

    @property
    def launched(self) -> int:
        return sum(self.kernels.values())

    @property
    def waited(self) -> int:
        return sum(self.waits.values())

    def report(self) -> str:
        """The waits with the lines that asked for them, the most frequent first."""
        lines = [f"{count:6} {kind}: {ours} ({asked})" for (kind, ours, asked), count in self.where.most_common()]
        return "\n".join(lines)


def note(kind: str) -> None:
    """Count a wait of the host for the card."""
    watch = Watch.active
    if watch is None:
        return
    ours, asked = _places()
    watch.waits[kind] += 1
    watch.where[kind, ours, asked] += 1


def _places() -> tuple[str, str]:
    """The innermost line of the product, and the innermost line outside torch, of the calls that led here."""
    here = str(Path(__file__).parent)
    asked, frame = "", sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(here) and "/torch/" not in name:
            place = f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}"
            asked = asked or place
            if "/hapo_lite/" in name:
                return place, asked
        frame = frame.f_back
    return "tests", asked


class Pretended(Tensor):
    """A tensor on the pretended GPU. inner: its data, on the CPU, with the same shape, strides and dtype."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
            requires_grad=False,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What follows reads memory, or asks the engine of autograd, without the dispatcher.

    def tolist(self) -> Any:
        note("value")
        return self.inner.tolist()

    def backward(self, gradient: Tensor | None = None, **options: Any) -> None:
        from tests.pretend_gpu.backward import backward

        backward(self, gradient)

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Pretended) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner


def plain(value: Any) -> Any:
    """`value` with the CPU's tensors in place of pretended ones."""
    return tree_map(_on_cpu, value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.inner
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _run(func, args, kwargs):
    """The operator's result, after CUDA's rules have been kept and its cost counted."""
    name = func._schema.name.split("::")[-1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = any(isinstance(x, Pretended) for x in tensors)
    device = kwargs.get("device")
    on_card = ours if device is None else torch.device(device).type == "cuda"
    if ours:
        _check_devices(func, name, args, kwargs, tensors)
        _check_dtypes(func, name, tensors)
    _note_waits(name, args, kwargs, ours, on_card)
    if on_card and name not in FREE and name not in READS and not _is_view(func):
        count_kernel(name)
    out = _compute(func, name, args, kwargs)
    if not on_card:
        return out
    wrapped = tree_map(lambda x: Pretended(x) if isinstance(x, Tensor) else x, out)
    # A copy from another device and a factory share nothing with their arguments.
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours and name != "_to_copy" else wrapped


def count_kernel(name: str) -> None:
    """Count a launch."""
    if Watch.active is not None:
        Watch.active.kernels[name] += 1


def _check_devices(func, name: str, args, kwargs, tensors: Iterable[Tensor]) -> None:
    """Refuse a tensor of the CPU in an operator of the card, except where CUDA takes it.

    CUDA takes a CPU tensor without dimensions that is only read, indices, and one side of a copy.
    """
    if name in ("copy_", "_to_copy"):
        return
    allowed = {id(index) for index in args[1] or () if index is not None} if name in INDEXING else set()
    written = {
        id(x)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for x in tree_leaves(args[place] if place < len(args) else kwargs.get(argument.name))
    }
    for x in tensors:
        if isinstance(x, Pretended) or id(x) in allowed or (x.dim() == 0 and id(x) not in written):
            continue
        shown = ", ".join(f"{t.device.type} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
        raise Refused(f"{func} is given tensors of two devices: {shown}")


def _check_dtypes(func, name: str, tensors: list[Tensor]) -> None:
    """Refuse products that have no kernel on CUDA: of integers, of two dtypes, or into a dtype that is not offered."""
    if name not in PRODUCTS:
        return
    dtypes = [x.dtype for x in tensors]
    if not all(dtype.is_floating_point for dtype in dtypes):
        raise Refused(f"{func} has no kernel on CUDA for {dtypes}")
    if "dtype" not in func._overloadname and len(set(dtypes)) > 1:
        raise Refused(f"{func} is given factors of several dtypes: {dtypes}")


def _check_wanted(func, left: Tensor, right: Tensor, added: Tensor | None, wanted: torch.dtype) -> None:
    """Refuse a product with a dtype of its result that CUDA does not offer: only 16-bit factors into fp32 are there."""
    widened = left.dtype in NARROW and wanted == torch.float32
    if left.dtype != right.dtype or not (widened or wanted == left.dtype):
        raise Refused(f"{func} is given {left.dtype} and {right.dtype}, and shall give {wanted}")
    if added is not None and added.dtype not in (wanted, left.dtype):
        raise Refused(f"{func} adds {added.dtype} to a product of {left.dtype} in {wanted}")


def _note_waits(name: str, args, kwargs, ours: bool, on_card: bool) -> None:
    if name in ("copy_", "_to_copy") and args[0].numel() == 0:
        return  # nothing is copied
    if name == "copy_":
        here, there = (isinstance(x, Pretended) for x in args[:2])
        if here and not there and not _without_waiting(args, kwargs, 2):
            note("to the card")
        elif there and not here:
            note("to the CPU")
    elif name == "_to_copy":
        if ours and not on_card:
            note("to the CPU")
        elif on_card and not ours and not kwargs.get("non_blocking"):
            note("to the card")
    elif ours and name in READS:
        note("value")
    elif ours and name in SIZES:
        note("size")
    elif ours and name in INDEXING:
        for index in (x for x in args[1] if x is not None):
            if index.dtype in (torch.bool, torch.uint8):
                note("size")
            elif not isinstance(index, Pretended):
                note("to the card")


def _without_waiting(args, kwargs, place: int) -> bool:
    return bool(args[place] if place < len(args) else kwargs.get("non_blocking"))


def _is_view(func) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _compute(func, name: str, args, kwargs):
    """The operator on the CPU. A product with a dtype of its result, which a CPU does not have, is made in fp32."""
    given, named = plain(args), plain(kwargs)
    if name not in ("mm", "bmm", "addmm", "baddbmm") or "dtype" not in func._overloadname:
        return func(*given, **named)
    added = given[0] if name in ("addmm", "baddbmm") else None
    left, right, wanted = given[-3:] if added is None else given[1:4]
    _check_wanted(func, left, right, added, wanted)
    product = left.float() @ right.float()
    if added is not None:
        product = named.get("alpha", 1) * product + named.get("beta", 1) * added.float()
    out = named.get("out")
    return product.to(wanted) if out is None else out.copy_(product)
