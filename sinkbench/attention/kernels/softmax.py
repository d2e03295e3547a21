"""What Triton programs of attention share: a soft cap, and a softmax that is formed some columns at a time."""

import triton
import triton.language as tl


@triton.jit
def capped(score, cap, CAP: tl.constexpr):
    """``cap * tanh(score / cap)``, where there is a cap."""
    if CAP:
        score = cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
    return score


@triton.jit
def with_columns(x, top, total):
    """A softmax with further columns of scores ``x``, ``(rows, columns)``, -inf where a row does not see one.

    Returns:
        With them, the highest score and the sum of each row; their shares by it; and by what those before shrink.
    """
    higher = tl.maximum(top, tl.max(x, axis=1))
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    shares = tl.exp(x - safe[:, None])
    shrink = tl.exp(top - safe)
    return higher, total * shrink + tl.sum(shares, axis=1), shares, shrink
