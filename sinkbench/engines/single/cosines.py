"""Cosines and sines of a position, which a model forms before its first layer, as one Triton launch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last

LAYOUTS = ("half", "interleaved", "short")  # all pairs twice, each pair twice, or once


@triton.jit
def _cosines(
    position, frequencies, cos, sin, scale, pairs, count,
    LAYOUT: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    f = tl.arange(0, WIDTH)
    inside = f < count
    pair = f // 2 if LAYOUT == "interleaved" else f % pairs
    frequency = tl.load(frequencies + pair, mask=inside, other=0.0).to(tl.float32)
    wait_for_last(OVERLAP)
    angle = tl.load(position).to(tl.float32) * frequency
    tl.store(cos + f, (tl.cos(angle) * scale).to(cos.dtype.element_ty), mask=inside)
    tl.store(sin + f, (tl.sin(angle) * scale).to(sin.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Cosines:
    """What a rotary module answers with for one position: cosines and sines ``(1, 1, n)``, times a scale."""

    frequencies: Tensor
    layout: str
    scale: float
    plain: Callable[..., Any]

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or position_ids.numel() != 1:
            return self.plain(x, position_ids, *args, **kwargs)
        return self.of(x, position_ids)

    def of(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of ``x``."""
        pairs = len(self.frequencies)
        count = pairs if self.layout == "short" else 2 * pairs
        cos, sin = (x.new_empty(1, 1, count) for _ in range(2))
        width = triton.next_power_of_2(count)
        told = {"LAYOUT": self.layout, "WIDTH": width, "num_warps": 1, **overlapping(x)}
        launch(_cosines, (1,), position, self.frequencies, cos, sin, self.scale, pairs, count, **told)
        return cos, sin


def cosines_of(module: nn.Module) -> Cosines | None:
    """What ``module`` answers with, found by asking it; ``None`` where it is no rotary module, or another one."""
    frequencies = getattr(module, "inv_freq", None)
    if not isinstance(frequencies, Tensor) or frequencies.dim() != 1 or frequencies.dtype != torch.float32:
        return None
    x = frequencies.new_zeros(1, 1, 1)
    first, later = (torch.tensor([[t]], device=x.device) for t in (0, 7))
    try:
        scale = float(module(x, first)[0].flatten()[0])
        wanted = module(x, later)
    except Exception:  # it is called in another way
        return None
    if len(wanted) != 2:
        return None
    for layout in LAYOUTS:
        found = Cosines(frequencies, layout, scale, module.forward)
        got = found.of(x, later)
        if all(w.shape == g.shape and torch.allclose(w, g, atol=1e-5) for w, g in zip(wanted, got, strict=True)):
            return found
    return None
