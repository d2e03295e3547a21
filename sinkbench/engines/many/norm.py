"""Norms of many tokens, along with a sum before them, as one Triton launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.engines.single.norm import Norm

TILE = 2048  # numbers that a program has at least, of several rows where these are short
WIDEST = 2**15  # numbers of a row that one program can have


@triton.jit
def _normalise(
    x, more, sums, weight, bias, out, eps, offset, rows, dim,
    SUM: tl.constexpr, CENTRED: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    inside = (r < rows)[:, None] & (d < dim)[None, :]
    at = r.to(tl.int64)[:, None] * dim + d[None, :]
    kind = out.dtype.element_ty
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if SUM:
        y = (y + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(sums + at, y, mask=inside)
        y = y.to(tl.float32)
    if CENTRED:
        y = tl.where(inside, y - (tl.sum(y, axis=1) / dim)[:, None], 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=1) / dim + eps)[:, None]
    if ROUNDED:
        y = y.to(kind).to(tl.float32)
    y = y * (tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32) + offset)[None, :]
    if BIAS:
        y += tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(kind), mask=inside)


@dataclass(frozen=True)
class Normed:
    """``value`` normalised, and ``value``."""

    out: Tensor
    value: Tensor


def normalise(x: Tensor, more: Tensor | None, norm: Norm) -> Normed:
    """``norm`` of ``x``, or of ``x + more``, each contiguous, ``(..., dim)``."""
    dim, out = x.shape[-1], torch.empty_like(x)
    value = x if more is None else torch.empty_like(x)
    rows, width = x.numel() // dim, triton.next_power_of_2(dim)
    together = min(max(1, TILE // width), triton.next_power_of_2(rows))
    _normalise[(triton.cdiv(rows, together),)](
        *(x, x if more is None else more, value, norm.weight, norm.weight if norm.bias is None else norm.bias, out),
        *(norm.eps, norm.offset, rows, dim),
        **{"SUM": more is not None, "CENTRED": norm.centred, "ROUNDED": norm.rounded, "BIAS": norm.bias is not None},
        **{"ROWS": together, "WIDTH": width, "num_warps": min(16, max(4, together * width // 512))},
    )
    return Normed(out, value)
