"""A launch that begins while the one before it still runs, on devices that can (Hopper and later).

What a program reads that no other launch of the same graph writes, weights and old keys, it reads before it waits;
everything else after, but for what a launch before the last one wrote, where that one waited before it let this begin
(:mod:`sinkbench.engines.single.chosen`). It may write nothing before it has waited. CUDA calls this programmatic
dependent launch.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

POSSIBLE = hasattr(tl.extra.cuda, "gdc_wait")


@triton.jit
def begin_next(OVERLAP: tl.constexpr):
    """Let the next launch begin as soon as all programs of this one have begun."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAP: tl.constexpr):
    """Wait until the launch before this one has ended, and what it wrote can be read."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


def overlapping(x: Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on the device of ``x``."""
    if not (POSSIBLE and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
