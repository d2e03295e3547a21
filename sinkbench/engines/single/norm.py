"""Norms of single vectors, each as one Triton launch, along with sums that come between two of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.positions.rotary import wide

WARPS = (256, 1), (1024, 4), (4096, 8)  # up to how many numbers a program has how many


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(mean square + eps) * (offset + weight) + bias`` over the last dimension.

    Attributes:
        centred: whether the mean is taken off.
        offset: what is added to the weight: 1 in Gemma's, which are kept as distances from 1.
        rounded: whether the quotient is rounded to the dtype of ``x`` before the weight meets it.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float
    centred: bool = False
    offset: float = 0.0
    rounded: bool = False

    def plainly(self, x: Tensor) -> Tensor:
        """The same in plain torch."""
        y = x.to(wide(x.dtype))
        if self.centred:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        y = y.to(x.dtype).to(y.dtype) if self.rounded else y
        y = y * (self.offset + self.weight.to(y.dtype))
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` of shape ``(..., dim)``, contiguous, normalised."""
        out = torch.empty_like(x)
        normalise(x, None, (), None, self, out)
        return out


@triton.jit
def _normed(
    y, weight, bias, eps, inside, dim,
    CENTRED: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    if CENTRED:
        y = tl.where(inside, y - tl.sum(y, axis=0) / dim, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / dim + eps)
    if ROUNDED:
        y = y.to(KIND).to(tl.float32)
    y = y * weight
    if BIAS:
        y += bias
    return y.to(KIND).to(tl.float32)


@triton.jit
def _normalise(
    x, second, third, first_weight, first_bias, sums, last_weight, last_bias, out,
    first_eps, first_offset, last_eps, last_offset, dim,
    FIRST: tl.constexpr, FIRST_CENTRED: tl.constexpr, FIRST_ROUNDED: tl.constexpr, FIRST_BIAS: tl.constexpr,
    LAST: tl.constexpr, LAST_CENTRED: tl.constexpr, LAST_ROUNDED: tl.constexpr, LAST_BIAS: tl.constexpr,
    MORE: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    d = tl.arange(0, WIDTH)
    inside = d < dim
    kind = sums.dtype.element_ty
    weight, bias = inside.to(tl.float32), inside.to(tl.float32)
    other_weight, other_bias = weight, bias
    if FIRST:
        weight = tl.load(first_weight + d, mask=inside, other=0.0).to(tl.float32) + first_offset
    if FIRST_BIAS:
        bias = tl.load(first_bias + d, mask=inside, other=0.0).to(tl.float32)
    if LAST:
        other_weight = tl.load(last_weight + d, mask=inside, other=0.0).to(tl.float32) + last_offset
    if LAST_BIAS:
        other_bias = tl.load(last_bias + d, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    at = tl.program_id(0) * dim + d
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a, b = y, y
    if MORE > 0:
        a = tl.load(second + at, mask=inside, other=0.0).to(tl.float32)
    if MORE > 1:
        b = tl.load(third + at, mask=inside, other=0.0).to(tl.float32)
    if FIRST:
        y = _normed(y, weight, bias, first_eps, inside, dim, FIRST_CENTRED, FIRST_ROUNDED, FIRST_BIAS, kind)
    if MORE > 0:
        y = (y + a).to(kind).to(tl.float32)
        if MORE > 1:
            y = (y + b).to(kind).to(tl.float32)
        tl.store(sums + at, y.to(kind), mask=inside)
    if LAST:
        y = _normed(y, other_weight, other_bias, last_eps, inside, dim, LAST_CENTRED, LAST_ROUNDED, LAST_BIAS, kind)
        tl.store(out + at, y.to(kind), mask=inside)


def normalise(
    x: Tensor, first: Norm | None, more: Sequence[Tensor], sums: Tensor | None, last: Norm | None, out: Tensor
) -> None:
    """Fill ``sums`` with ``first(x)``, or ``x``, plus ``more``, and ``out`` with ``last`` of that, in one launch.

    Args:
        x: ``(..., dim)``, contiguous, and so all of the others; several vectors only where nothing is added.
        more: at most two.
        last: ``None`` where there is nothing more to do than the sum; ``out`` is then left alone.
    """
    norm = last or first
    dim = x.numel() if norm is None else norm.weight.shape[0]
    spare = [*more, x, x]
    warps = next((warps for longest, warps in WARPS if dim <= longest), 16)
    launch(
        _normalise,
        (x.numel() // dim,),
        *(x, *spare[:2], *_tensors(first, x), out if sums is None else sums, *_tensors(last, x), out),
        *(first.eps if first else 0.0, first.offset if first else 0.0),
        *(last.eps if last else 0.0, last.offset if last else 0.0, dim),
        **_flags("FIRST", first),
        **_flags("LAST", last),
        **{"MORE": len(more), "WIDTH": triton.next_power_of_2(dim), "num_warps": warps, **overlapping(x)},
    )


def _tensors(norm: Norm | None, spare: Tensor) -> tuple[Tensor, Tensor]:
    if norm is None:
        return spare, spare
    return norm.weight, norm.weight if norm.bias is None else norm.bias


def _flags(name: str, norm: Norm | None) -> dict[str, bool]:
    if norm is None:
        return {name: False, f"{name}_CENTRED": False, f"{name}_ROUNDED": False, f"{name}_BIAS": False}
    flags = {"CENTRED": norm.centred, "ROUNDED": norm.rounded, "BIAS": norm.bias is not None}
    return {name: True, **{f"{name}_{flag}": value for flag, value in flags.items()}}


def norm_of(module: nn.Module) -> Norm | None:
    """What ``module`` computes, found by asking it for norms of a few vectors; ``None`` where it is no such norm."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("Norm") or not isinstance(weight, Tensor):
        return None
    if weight.dim() != 1 or weight.dtype == torch.float64:
        return None
    bias = getattr(module, "bias", None)
    eps = next((e for e in (getattr(module, n, None) for n in ("variance_epsilon", "eps")) if e is not None), None)
    if eps is None or not isinstance(eps, float) or not isinstance(bias, Tensor | None):
        return None
    candidates = [
        Norm(weight, bias, eps, centred, offset, rounded)
        for centred in ((True,) if isinstance(module, nn.LayerNorm) else (False, True))
        for offset in (0.0, 1.0)
        for rounded in (False, True)
    ]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(2, 1, weight.shape[0], dtype=weight.dtype, device=weight.device, generator=generator) + 0.5
    try:
        wanted = module(x).detach()
    except Exception:  # it is called in another way
        return None
    if not isinstance(wanted, Tensor) or wanted.shape != x.shape or wanted.dtype != x.dtype:
        return None
    size = float(wanted.abs().max())
    off = [float((norm.plainly(x).detach() - wanted).abs().max()) for norm in candidates]
    best = min(range(len(off)), key=off.__getitem__)
    return candidates[best] if off[best] <= 8 * torch.finfo(x.dtype).eps * size else None
