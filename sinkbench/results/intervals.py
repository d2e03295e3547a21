"""Means of dependent values with intervals."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def exp(self) -> "Interval":
        """Of the exponential."""
        return Interval(*(float(np.exp(x)) for x in (self.value, self.low, self.high)))

    def times(self, factor: float) -> "Interval":
        """In another unit; ``factor`` is positive."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    def moved(self, to: float) -> "Interval":
        """The same around another value; as it is where that is not finite."""
        by = to - self.value
        return Interval(to, self.low + by, self.high + by) if np.isfinite(by) else self


def block_length(n: int) -> int:
    """Of the blocks that are drawn from ``n`` tokens."""
    return min(n, max(32, round(2 * n ** (1 / 3))))


def interval(values: np.ndarray, seed: int = 0) -> Interval:
    """The mean of ``values`` and its 95 % interval by a circular block bootstrap (Politis and Romano, 1992).

    Neighbouring tokens are not independent, so blocks are drawn, not tokens: ``2 n^(1/3)`` of them in length, at
    least 32.
    """
    n = len(values)
    block = block_length(n)
    sums = np.cumsum(np.concatenate([[0.0], values, values[: block - 1]]))
    with np.errstate(invalid="ignore"):  # where a value is none, so is its interval
        means = (sums[block:] - sums[:-block]) / block
    count = -(-n // block)
    draws = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, count))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
