"""What stands between two launches of ours, sums of two vectors and activations, as launches that overlap too.

A launch of torch's own waits for all before it and lets nothing begin before its end. So within a captured step such an
operation on single vectors is answered by a Triton program that computes the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.engines.single.activation import activated

BLOCK = 1024
SHORTEST = 64  # numbers, below which nothing is a hidden state
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
aten = torch.ops.aten
KINDS = {aten.silu.default: "silu", aten.relu.default: "relu"}


@triton.jit
def _combine(x, y, out, count, KIND: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin_next(OVERLAP)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    wait_for_last(OVERLAP)
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if KIND == "add":
        a += tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    elif KIND == "mul":
        a *= tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    else:
        a = activated(a, KIND)
    tl.store(out + at, a.to(out.dtype.element_ty), mask=inside)


def combined(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """``x + y`` (``add``), ``x * y`` (``mul``), or an activation of ``x``."""
    out = torch.empty_like(x)
    launch = {"KIND": kind, "BLOCK": BLOCK, "num_warps": 4, **overlapping(x)}
    _combine[(triton.cdiv(x.numel(), BLOCK),)](x, y, out, x.numel(), **launch)
    return out


class Overlapping(TorchDispatchMode):
    """While it is entered, sums, products and activations of single vectors are launches of ours."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func, args, kwargs)
        if kind is None:
            return func(*args, **kwargs)
        return combined(args[0], args[-1] if isinstance(args[-1], Tensor) else args[0], kind)


def _kind(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What ``func`` does that is ours to do; ``None`` where it is not."""
    if not args or not _is_vector(args[0]):
        return None
    if func in (aten.add.Tensor, aten.mul.Tensor):
        alike = len(args) == 2 and _is_vector(args[1]) and args[0].shape == args[1].shape
        same = alike and args[0].dtype == args[1].dtype and not kwargs
        return ("add" if func is aten.add.Tensor else "mul") if same else None
    if func is aten.gelu.default and len(args) == 1:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(kwargs.get("approximate", "none"))
    return KINDS.get(func) if len(args) == 1 and not kwargs else None


def _is_vector(x: Any) -> bool:
    if not isinstance(x, Tensor) or not x.is_cuda or x.dtype not in DTYPES or x.dim() == 0:
        return False
    return x.is_contiguous() and x.numel() == x.shape[-1] >= SHORTEST
