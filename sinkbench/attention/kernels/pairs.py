"""What Triton programs share that turn features in pairs, of one token."""

import triton
import triton.language as tl


@triton.jit
def turned(x, cos, sin, f, inside, rotating, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr):
    """Features ``f`` of the head at ``x``, in its dtype; the first ``rotating`` of the head turn.

    Args:
        inside: which of them are features of the head; others are 0.
    """
    half = rotating // 2
    if INTERLEAVED:
        low = f % 2 == 0
        other = tl.where(low, f + 1, f - 1)
        pair = f // 2
    else:
        low = f < half
        other = tl.where(low, f + half, f - half)
        pair = tl.where(low, f, f - half)
    angle = pair if BY_PAIR else f
    turning = inside & (f < rotating)
    own = tl.load(x + f, mask=inside, other=0.0)
    cosine = tl.load(cos + angle, mask=turning, other=1.0).to(tl.float32)
    sine = tl.load(sin + angle, mask=turning, other=0.0).to(tl.float32)
    opposite = tl.load(x + other, mask=turning, other=0.0).to(tl.float32)
    return (own.to(tl.float32) * cosine + tl.where(low, -opposite, opposite) * sine).to(own.dtype)
