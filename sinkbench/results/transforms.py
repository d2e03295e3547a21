"""From a column to the curve that is drawn of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import pandas as pd

Values: TypeAlias = "pd.Series[float]"
Transform: TypeAlias = Callable[[Values], Values]

AVERAGED = 256  # values


def unchanged(values: Values) -> Values:
    """As it is."""
    return values


def log(values: Values) -> Values:
    """Natural logarithm; of what overflowed to ``inf``, that of the largest float64."""
    import numpy as np

    return np.log(values.clip(upper=np.finfo(np.float64).max))


def smoothed(values: Values) -> Values:
    """Rolling median: hiccups of the machine vanish, steps stay where they are.

    At both ends the window is what there is of it, at least its half.
    """
    window = max(25, len(values) // 100)
    return values.rolling(window, center=True, min_periods=1).median()


def averaged(values: Values) -> Values:
    """Mean of the last 256 values; at the beginning, of at least half as many."""
    return values.rolling(AVERAGED, min_periods=min(AVERAGED // 2, len(values))).mean()
