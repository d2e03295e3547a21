"""Activations, for Triton programs of ours."""

import triton
import triton.language as tl


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
