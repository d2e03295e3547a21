"""The recall distance at which a loss sets in."""

import numpy as np

from sinkbench.results.resampling import group_sums

LEAST = 32  # tokens on either side, and at least a hundredth of them


def recall_onset(losses: np.ndarray, distances: np.ndarray, streams: np.ndarray | None = None) -> int | None:
    """The distance from which on tokens are lost, by the step that fits their losses best.

    Tokens are sorted by distance, and parted where two levels leave the least squares. ``None`` where the upper level
    is not above the lower one beyond both their intervals, or there are too few tokens to say.

    Args:
        losses: nats, finite, in the order of the stream, shape ``(n,)``.
        distances: of each token, 0 where there is none; those do not count.
        streams: the document of each; ``None`` where all are of one stream.
    """
    known = np.flatnonzero(distances > 0)
    least = max(LEAST, len(known) // 100)
    if len(known) < 2 * least:
        return None
    order = known[np.argsort(distances[known], kind="stable")]
    sorted_distances, sums = distances[order], np.cumsum(losses[order])
    before = np.arange(least, len(order) - least)  # tokens on the lower side
    before = before[sorted_distances[before] > sorted_distances[before - 1]] if len(before) else before
    if not len(before):
        return None
    lower, upper = sums[before - 1] / before, (sums[-1] - sums[before - 1]) / (len(order) - before)
    gain = np.where(upper > lower, before * (len(order) - before) * (upper - lower) ** 2, 0.0)
    onset = int(sorted_distances[before[gain.argmax()]])
    groups = np.where(distances == 0, 2, distances >= onset)
    found = group_sums(losses, groups, 3, streams=streams)
    under, over = found.mean([0]), found.mean([1])
    return onset if under and over and over.low > under.high else None
