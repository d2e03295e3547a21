"""The scale of losses in figures: linear, or logarithmic away from 0 where they are far apart."""

from collections.abc import Sequence

import numpy as np

LINEAR = 0.5  # nats up to which an axis of losses is linear
NEAR = 0.03  # nats around 0 in which a logarithmic one is linear
TICKS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether the axis that shows ``values`` is logarithmic."""
    return max((abs(value) for value in values), default=0.0) > LINEAR


def ticks(values: Sequence[float]) -> list[float]:
    """What a logarithmic axis names."""
    low, high = min(0.0, *values), max(0.0, *values)
    named = [tick for tick in TICKS if tick >= NEAR or max(-low, high) < 1]  # there is little room around 0
    return [tick for tick in (*(-tick for tick in reversed(named)), 0.0, *named) if low * 1.5 <= tick <= high * 1.5]


def cost_ticks(low: float, high: float) -> list[float]:
    """What a logarithmic axis of costs from ``low`` to ``high`` names: round numbers, three of them at least."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8), tuple(np.arange(1, 10, 0.1))):
        found = [float(f"{step * 10.0**power:.3g}") for power in decades for step in steps]
        kept = [value for value in found if low <= value <= high]
        if len(kept) >= 3:
            return kept[:: -(-len(kept) // 9)]
    return sorted({float(f"{value:.4g}") for value in np.geomspace(low, high, 3)})


def tick_text(value: float) -> str:
    """A loss as an axis names it."""
    return f"{value:+g}" if value else "0"


def finite(values: Sequence[float]) -> list[float]:
    """Those of ``values`` that are numbers."""
    return [value for value in values if np.isfinite(value)]
