"""Means of dependent values with intervals: of tokens of one stream, or of several documents."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
DRAWS = 2**20  # numbers drawn at a time


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


def interval(values: np.ndarray, seed: int = 0, streams: np.ndarray | None = None) -> Interval:
    """The mean of ``values`` and its 95 % interval.

    Of one stream by a circular block bootstrap (Politis and Romano, 1992): neighbouring tokens are not independent, so
    blocks are drawn, not tokens: ``2 n^(1/3)`` of them in length, at least 32. Of several documents, whose numbers
    ``streams`` has for each value, by drawing documents.
    """
    n = len(values)
    if streams is not None and len(documents := np.unique(streams, return_inverse=True)[1]) and documents.max() > 0:
        return _over_documents(values, documents, seed)
    block = block_length(n)
    sums = np.cumsum(np.concatenate([[0.0], values, values[: block - 1]]))
    with np.errstate(invalid="ignore"):  # where a value is none, so is its interval
        means = (sums[block:] - sums[:-block]) / block
    count = -(-n // block)
    draws = np.random.default_rng(seed).integers(0, n, size=(RESAMPLES, count))
    low, high = np.quantile(means[draws].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _over_documents(values: np.ndarray, documents: np.ndarray, seed: int) -> Interval:
    """The mean of ``values`` with its interval from drawing documents; a mean is a sum over a number of tokens."""
    sums, counts = np.bincount(documents, values), np.bincount(documents).astype(float)
    draw, n = np.random.default_rng(seed), len(sums)
    at_once = max(1, min(RESAMPLES, DRAWS // n))
    means = []
    for begin in range(0, RESAMPLES, at_once):
        chosen = draw.integers(0, n, size=(min(at_once, RESAMPLES - begin), n))
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
