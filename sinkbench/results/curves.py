"""From rows to a curve: transformed, finite, and of no more points than a screen shows."""

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from sinkbench.results.documents import by_length
from sinkbench.results.transforms import Transform

if TYPE_CHECKING:
    import pandas as pd

DECADES = 6  # of a logarithmic axis, at most: what lies lower is rounding
Curve: TypeAlias = tuple[np.ndarray, np.ndarray]  # tokens read and values, shape ``(n,)`` each


def curve_of(
    frame: "pd.DataFrame", column: str, transform: Transform, points: int, logarithmic: bool = False
) -> Curve | None:
    """``column`` over the input length in about ``points`` points at most; ``None`` where there is nothing to draw.

    Of several documents, what they come to at each input length. On a ``logarithmic`` axis nothing is drawn of what is
    not above 0.
    """
    frame = by_length(frame)
    values = transform(frame[column].dropna())
    values = values[np.isfinite(values) & (values > 0)] if logarithmic else values[np.isfinite(values)]
    if not len(values):
        return None
    return thinned(frame["input_length"][values.index].to_numpy(), values.to_numpy(), points)


def thinned(x: np.ndarray, y: np.ndarray, points: int) -> Curve:
    """Of a curve of more than ``points`` points, its ends and the lowest and highest point of each stretch.

    So what is drawn looks like all of it, peaks included.
    """
    if len(y) <= points:
        return x, y
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), points // 2):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    chosen = sorted(kept)
    return x[chosen], y[chosen]
