"""Activations: by what they compute, and for Triton programs of ours."""

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": GELU_TANH,
    "gelu": F.gelu,
    "relu": F.relu,
}


def activation_of(act: Callable[[Tensor], Tensor], device: torch.device) -> str | None:
    """Which of :data:`ACTIVATIONS` this is, however many operations it takes for it; ``None`` for another."""
    # in float64: of float32 some are computed by all cores of a processor, which other programs may use
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, device=device)
    try:
        return next((name for name, known in ACTIVATIONS.items() if torch.allclose(act(x), known(x), atol=1e-6)), None)
    except Exception:  # it is called in another way
        return None


@triton.jit
def activated(x, KIND: tl.constexpr):
    """The activation ``KIND`` of float32 numbers."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    if KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if KIND == "tanh":
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    if KIND == "relu":
        return tl.maximum(x, 0.0)
    return x
