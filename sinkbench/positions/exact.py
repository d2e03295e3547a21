"""Rotary angles without rounding.

transformers forms ``position * frequency`` in float32, whose error grows with the position: 1e-4 rad at position 2,000,
0.06 rad at 10^6. Two runs that place a token at different positions would differ by that. Here angles are formed in
float64 and rounded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# How models lay out the cosines of n pairs over features: all pairs twice, each pair twice, or once.
LAYOUTS = (
    lambda x: torch.cat((x, x), dim=-1),
    lambda x: x.repeat_interleave(2, dim=-1),
    lambda x: x,
)


@contextmanager
def exact_angles(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, rotary modules of a float32 ``model`` answer with exact cosines and sines.

    In half precision their rounding to the model's dtype outweighs the error by far, and nothing is changed.
    """
    hooks = []
    if model.dtype == torch.float32:
        rotary = [
            m for m in model.modules() if any(name.endswith("inv_freq") for name, _ in m.named_buffers(recurse=False))
        ]
        hooks = [module.register_forward_hook(_exact, with_kwargs=True) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _exact(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What ``module`` answered, with exact angles; as it is, where its answer is not understood."""
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    layer_type = kwargs.get("layer_type", args[2] if len(args) > 2 else None)
    prefix = f"{layer_type}_" if layer_type else ""
    inv_freq = getattr(module, f"{prefix}inv_freq", None)
    if not (isinstance(output, tuple) and len(output) == 2 and isinstance(positions, Tensor) and inv_freq is not None):
        return output
    scale = getattr(module, f"{prefix}attention_scaling", 1.0)
    angles = positions.double()[..., None] * inv_freq.double()
    cos, sin = (x * scale for x in (angles.cos(), angles.sin()))
    near = [_distance(spread(cos), output[0]) + _distance(spread(sin), output[1]) for spread in LAYOUTS]
    best = min(range(len(LAYOUTS)), key=near.__getitem__)
    if near[best] > 0.05:
        return output
    return tuple(LAYOUTS[best](x).to(like.dtype) for x, like in zip((cos, sin), output, strict=True))


def _distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().mean()) if ours.shape == theirs.shape else float("inf")
