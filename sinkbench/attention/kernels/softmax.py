"""What Triton programs share: a soft cap, a softmax that is formed some columns at a time, and sums of powers."""

import triton
import triton.language as tl


@triton.jit
def capped(score, cap, CAP: tl.constexpr):
    """``cap * tanh(score / cap)``, where there is a cap."""
    if CAP:
        score = cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
    return score


@triton.jit
def safe(top):
    """``top``, and 0 where it is -inf: what exponents are taken beside, so that exp(-inf - top) is 0 and no NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def joined(tops, sums):
    """The sum of ``sums * exp(tops)``, ``(n,)``, or a number for all sums: its largest top, and the sum beside it."""
    highest = tl.max(tops, axis=0)
    return highest, tl.sum(sums * tl.exp(tops - safe(highest)), axis=0)


@triton.jit
def with_columns(x, top, total):
    """A softmax with further columns of scores ``x``, ``(rows, columns)``, -inf where a row does not see one.

    Returns:
        With them, the highest score and the sum of each row; their shares by it; and by what those before shrink.
    """
    higher = tl.maximum(top, tl.max(x, axis=1))
    beside = safe(higher)
    shares = tl.exp(x - beside[:, None])
    shrink = tl.exp(top - beside)
    return higher, total * shrink + tl.sum(shares, axis=1), shares, shrink


@triton.jit
def with_values(sums, shrink, shares, value, PRECISION: tl.constexpr):
    """The outputs of a softmax, ``sums``, that shrink, with those of further columns by their ``shares``."""
    if PRECISION == "tf32x3":  # the sums of a tensor core are cut off, not rounded: over many columns that would add up
        added = tl.dot(shares.to(value.dtype), value, input_precision=PRECISION, out_dtype=sums.dtype)
        sums = sums * shrink[:, None] + added
    else:
        sums = sums * shrink[:, None]
        sums = tl.dot(shares.to(value.dtype), value, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums
