"""Means of groups of tokens, with intervals by one bootstrap for all groups: of blocks, or of documents."""

from dataclasses import dataclass

import numpy as np

from sinkbench.results.intervals import RESAMPLES, Interval, block_length
from sinkbench.signals import check

CELLS = 2048  # starts of blocks at most: in a longer stream they lie on a grid, and blocks are no shorter than its step
AT_ONCE = 100  # resamples


@dataclass(frozen=True)
class GroupSums:
    """Sums over groups of tokens: those of the stream itself first, then those of each resample.

    Attributes:
        sums: of the values, shape ``(1 + RESAMPLES, groups)``.
        counts: of the tokens, in the same shape.
    """

    sums: np.ndarray
    counts: np.ndarray

    def tokens(self, groups: list[int]) -> int:
        """How many there are in these groups together."""
        return int(self.counts[0, groups].sum())

    def total(self, groups: list[int]) -> float:
        """The sum of their values."""
        return float(self.sums[0, groups].sum())

    def mean(self, groups: list[int]) -> Interval | None:
        """The mean of the tokens in these groups and its 95 % interval; ``None`` where there is no token."""
        if not self.tokens(groups):
            return None
        counts = self.counts[:, groups].sum(axis=1)
        drawn = counts > 0  # a resample may hold no token of a rare group
        means = self.sums[drawn][:, groups].sum(axis=1) / counts[drawn]
        low, high = np.quantile(means[1:], [0.025, 0.975]) if len(means) > 1 else (means[0], means[0])
        return Interval(float(means[0]), float(low), float(high))


def group_sums(
    values: np.ndarray, groups: np.ndarray, count: int, seed: int = 0, streams: np.ndarray | None = None
) -> GroupSums:
    """The sums of ``values`` by group, and those of circular blocks drawn from the stream, or of documents drawn.

    Blocks are as long as those of :func:`sinkbench.results.intervals.interval` and hold tokens of all groups, so how
    many a group has varies with them, and its mean is a ratio of sums.

    Args:
        values: finite, in the order of the stream, shape ``(n,)``.
        groups: of each, 0 to ``count`` - 1.
        count: of groups.
        seed: of the draws.
        streams: the document of each; ``None`` where all are of one stream.
    """
    places, block = _drawn(len(values), streams)
    size, cell = int(places.max()) + 1, places * count + groups
    flat = [np.bincount(cell, weights, size * count) for weights in (values, None)]
    cells = np.concatenate([part.reshape(size, count).astype(float) for part in flat], axis=1)
    sums = np.cumsum(np.concatenate([np.zeros((1, 2 * count)), cells, cells[: block - 1]]), axis=0)
    blocks = sums[block:] - sums[:-block]
    draw, drawn, parts = np.random.default_rng(seed), -(-size // block), [cells.sum(axis=0)[None]]
    for _ in range(RESAMPLES // AT_ONCE):
        check()
        starts = draw.integers(0, size, size=(AT_ONCE, drawn)) + np.arange(AT_ONCE)[:, None] * size
        parts.append(np.bincount(starts.ravel(), minlength=AT_ONCE * size).reshape(AT_ONCE, size) @ blocks)
    both = np.concatenate(parts)
    # differences of sums leave traces of other groups where a block has no token of one
    counts = np.rint(both[:, count:])
    return GroupSums(np.where(counts > 0, both[:, :count], 0.0), counts)


def _drawn(n: int, streams: np.ndarray | None) -> tuple[np.ndarray, int]:
    """The cell in which each of ``n`` values lies, and how many cells in a row are drawn together."""
    if streams is not None and (documents := np.unique(streams, return_inverse=True)[1]).max() > 0:
        return documents, 1
    width = -(-n // CELLS)
    return np.arange(n) // width, min(-(-n // width), max(1, round(block_length(n) / width)))
