"""Activations of many tokens, times something else, as one Triton launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.engines.many.launching import from_row_to_row
from sinkbench.engines.single.activation import activated

BLOCK = 2048


@triton.jit
def _gate(x, y, out, x_row, y_row, width, blocks, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, column = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    at = column * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    a = activated(tl.load(x + row * x_row + at, mask=inside, other=0.0).to(tl.float32), KIND)
    a *= tl.load(y + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, a.to(out.dtype.element_ty), mask=inside)


def gate(x: Tensor, y: Tensor, kind: str) -> Tensor:
    """The activation ``kind`` of ``x``, times ``y``, both ``(..., n)`` and of one dtype."""
    (x_row, x), (y_row, y) = _rows(x), _rows(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    if x_row == y_row == width:
        rows, width = 1, x.numel()
    blocks = triton.cdiv(width, BLOCK)
    _gate[(rows * blocks,)](x, y, out, x_row, y_row, width, blocks, KIND=kind, BLOCK=BLOCK, num_warps=4)
    return out


def _rows(x: Tensor) -> tuple[int, Tensor]:
    """How far apart the rows of ``x`` lie, and ``x``, copied where that is not one number."""
    apart = from_row_to_row(x)
    return (x.shape[-1], x.contiguous()) if apart is None else (apart, x)
