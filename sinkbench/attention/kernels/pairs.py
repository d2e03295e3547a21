"""What Triton programs share that turn features in pairs."""

import triton
import triton.language as tl


@triton.jit
def paired(f, rotating, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr):
    """Of features ``f``: whether each is the first of its pair, the other one, and the angles that both read."""
    half = rotating // 2
    if INTERLEAVED:
        low = f % 2 == 0
        other = tl.where(low, f + 1, f - 1)
        pair = f // 2
    else:
        low = f < half
        other = tl.where(low, f + half, f - half)
        pair = tl.where(low, f, f - half)
    return low, other, pair if BY_PAIR else f, pair if BY_PAIR else other
