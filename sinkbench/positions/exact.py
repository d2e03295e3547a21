"""Rotary angles without rounding.

transformers forms ``position * frequency`` in float32, whose error grows with the position: 1e-4 rad at position 2,000,
0.06 rad at 10^6. Two runs that place a token at different positions would differ by that. Here angles are formed in
float64 and rounded once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkbench.calls import standing_in
from sinkbench.positions.bare import device_of

Layout = Callable[[Tensor], Tensor]

# How models lay out the cosines of n pairs over features: all pairs twice, each pair twice, or once.
LAYOUTS: tuple[Layout, ...] = (
    lambda x: torch.cat((x, x), dim=-1),
    lambda x: x.repeat_interleave(2, dim=-1),
    lambda x: x,
)
CLOSE = 0.05  # mean distance from what a module answers, below which a layout is the module's


@contextmanager
def exact_angles(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, rotary modules of a float32 or float64 ``model`` answer with exact cosines and sines.

    In this thread or task alone. In half precision their rounding to the model's dtype outweighs the error by far, and
    nothing is changed. How a module lays out its answer is found before: a step reads nothing back from the device for
    it.
    """
    exact = {}
    for module in model.modules() if model.dtype in (torch.float32, torch.float64) else ():
        kinds = [name.removesuffix("inv_freq").rstrip("_") for name in _frequencies(module)]
        layouts = {kind: layout for kind in kinds if (layout := _layout(module, kind, model)) is not None}
        if layouts:
            exact[module, "forward"] = partial(_exact, layouts, module)
    with standing_in(exact):
        yield


def _frequencies(module: nn.Module) -> list[str]:
    """The names of its buffers of frequencies in use, one for each kind of layers."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if name.endswith("inv_freq") and "original" not in name and "long" not in name]


def _layout(module: nn.Module, kind: str, model: PreTrainedModel) -> Layout | None:
    """How ``module`` lays out its answer for layers of ``kind``; ``None`` where that is not understood."""
    positions = torch.tensor([[0, 3]], device=device_of(model))
    try:
        with torch.no_grad():
            output = module(
                torch.zeros(1, 2, 1, dtype=model.dtype, device=device_of(model)), positions, *filter(None, [kind])
            )
    except Exception:  # a module that is called in another way: its angles are left as they are
        return None
    if not (isinstance(output, tuple) and len(output) == 2):
        return None
    ours = _angles(module, kind, positions)
    near = [sum(_distance(spread(x), y) for x, y in zip(ours, output, strict=True)) for spread in LAYOUTS]
    best = min(range(len(LAYOUTS)), key=near.__getitem__)
    return LAYOUTS[best] if near[best] <= CLOSE else None


def _exact(layouts: dict[str, Layout], module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``module`` answers by its ``own`` forward, with exact angles."""
    output = own(*args, **kwargs)
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    kind = kwargs.get("layer_type", args[2] if len(args) > 2 else None) or ""
    if kind not in layouts or not isinstance(positions, Tensor):
        return output
    exact = _angles(module, kind, positions)
    return tuple(layouts[kind](x).to(like.dtype) for x, like in zip(exact, output, strict=True))


def _angles(module: nn.Module, kind: str, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines at ``positions``, ``(..., pairs)``, float64, scaled as the module does."""
    prefix = f"{kind}_" if kind else ""
    scale = getattr(module, f"{prefix}attention_scaling", 1.0)
    angles = positions.double()[..., None] * getattr(module, f"{prefix}inv_freq").double()
    return angles.cos() * scale, angles.sin() * scale


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().mean()) if ours.shape == theirs.shape else float("inf")
