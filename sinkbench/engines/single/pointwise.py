"""What stands between two launches of ours, sums of two vectors and activations, as launches that overlap too.

A launch of torch's own waits for all before it and lets nothing begin before its end. So within a captured step such an
operation on single vectors is answered by a Triton program that computes the same.
"""

from contextlib import ExitStack
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.compilers import compiled_for
from sinkbench.engines.single import product, rotary, sums
from sinkbench.engines.single.activation import activated
from sinkbench.engines.single.pending import Pending
from sinkbench.engines.single.steady import Steady

BLOCK = 1024
SHORTEST = 64  # numbers, below which nothing is a hidden state
aten = torch.ops.aten
KINDS = {aten.silu.default: "silu", aten.relu.default: "relu", aten.tanh.default: "tanh"}
SCALED = {aten.mul.Tensor: "times", aten.div.Tensor: "over"}  # by a number
PAIRS = {aten.add.Tensor: "add", aten.add_.Tensor: "add", aten.mul.Tensor: "mul", aten.mul_.Tensor: "mul"}
ACTIVATIONS = {*KINDS.values(), "gelu", "gelu_tanh"}
LONGEST = 16384  # numbers of a sum that may wait for a norm
# What looks at no number of its arguments.
UNREAD = {aten._unsafe_view.default, aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default}


@triton.jit
def _combine(x, y, out, count, by, KIND: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin_next(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    wait_for_last(OVERLAP)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "add":
        a += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "mul":
        a *= tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "times":
        a = a * by
    elif KIND == "over":
        a = a / by
    else:
        a = activated(a, KIND)
    tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)


def combined(x: Tensor, y: Tensor | float, kind: str, out: Tensor | None = None) -> Tensor:
    """``x + y`` (``add``), ``x * y`` (``mul``), or an activation of ``x``; into ``out``, which may be ``x`` itself.

    Where ``y`` is a number: ``x * y`` (``times``) or ``x / y`` (``over``).
    """
    out = torch.empty_like(x) if out is None else out
    told = {"KIND": kind, "BLOCK": BLOCK, "num_warps": 4, **overlapping(x)}
    other, by = (y, 0.0) if isinstance(y, Tensor) else (x, float(y))
    launch(_combine, (triton.cdiv(x.numel(), BLOCK),), x, other, out, x.numel(), by, **told)
    return out


class Overlapping(TorchDispatchMode):
    """While it is entered, what stands between two launches of ours is a launch of ours too, or none at all."""

    def __init__(self, pending: Pending, steady: Steady, position: Tensor) -> None:
        super().__init__()
        self.pending, self.steady, self.position = pending, steady, position

    def __enter__(self) -> "Overlapping":
        self.stack = ExitStack()
        self.stack.enter_context(self.pending.open())
        self.steady.begin(self.position)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.steady.begin()
        self.stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func in UNREAD:
            return func(*args, **kwargs)
        if func is aten.cat.default and _last(args):
            whole = rotary.joined(args[0], self.pending)
            if whole is not None:
                return whole
        kind = _kind(func, args, kwargs)
        if kind == "add" and func is aten.add.Tensor and args[0].numel() <= LONGEST:
            return sums.added(args[0], args[1], self.pending)
        if kind in ACTIVATIONS:
            found = product.activated_product(args[0], kind, self.pending)
            if found is not None:
                return found
        self.pending.settle(*tree_leaves((args, kwargs)))
        changed = _changed(func, args, kwargs)
        self.pending.changes(*changed)
        self.steady.changes(*changed)
        if kind is not None:
            return combined(args[0], args[-1], kind, *changed)
        return func(*args, **kwargs) if changed else self.steady.answer(func, args, kwargs)


def _last(args: tuple[Any, ...]) -> bool:
    """Whether tensors are joined along their last dimension."""
    dim = args[1] if len(args) > 1 else 0
    return dim in (-1, args[0][0].dim() - 1)


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that ``func`` writes to."""
    if not func._schema.is_mutable:
        return []
    given = [*zip(func._schema.arguments, args, strict=False)]
    given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    written = [value for a, value in given if a.alias_info is not None and a.alias_info.is_write]
    return [x for x in tree_leaves(written) if isinstance(x, Tensor)]


def _kind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What ``func`` does that is ours to do; ``None`` where it is not."""
    if not args or not _is_vector(args[0]):
        return None
    if func in SCALED and len(args) == 2 and isinstance(args[1], float | int) and not kwargs:
        return SCALED[func]
    if func in PAIRS:
        alike = len(args) == 2 and _is_vector(args[1]) and args[0].shape == args[1].shape
        return PAIRS[func] if alike and args[0].dtype == args[1].dtype and not kwargs else None
    if func is aten.gelu.default and len(args) == 1:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(kwargs.get("approximate", "none"))
    return KINDS.get(func) if len(args) == 1 and not kwargs else None


def _is_vector(x: Any) -> bool:
    if not isinstance(x, Tensor) or not compiled_for(x) or x.dtype not in product.DTYPES or x.dim() == 0:
        return False
    return x.is_contiguous() and x.numel() == x.shape[-1] >= SHORTEST
