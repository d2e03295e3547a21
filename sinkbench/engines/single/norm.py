"""Norms of single vectors, each as one Triton launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.positions.rotary import wide


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
        dim = x.shape[-1]
        out = torch.empty_like(x)
        _normalise[(x.numel() // dim,)](
            *(x, self.weight, self.weight if self.bias is None else self.bias, out, self.eps, self.offset, dim),
            **{"CENTRED": self.centred, "ROUNDED": self.rounded, "BIAS": self.bias is not None},
            **{"WIDTH": triton.next_power_of_2(dim), "num_warps": 8 if dim > 1024 else 1, **overlapping(x)},
        )
        return out


@triton.jit
def _normalise(
    x, weight, bias, out, eps, offset, dim,
    CENTRED: tl.constexpr, ROUNDED: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    d = tl.arange(0, WIDTH)
    inside = d < dim
    scale = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32) + offset
    shift = scale
    if BIAS:
        shift = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    at = tl.program_id(0) * dim + d
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        y = tl.where(inside, y - tl.sum(y, axis=0) / dim, 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / dim + eps)
    if ROUNDED:
        y = y.to(out.dtype.element_ty).to(tl.float32)
    y = y * scale
    if BIAS:
        y += shift
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


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
