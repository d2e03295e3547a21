"""What runs come to in measures other than perplexity, over the rows that they share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sinkbench.results.columns import MEASURES, ComparedAs, Measure
from sinkbench.results.comparison import shared_rows
from sinkbench.results.divergence import divergence_of, has_reference
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.signals import check

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999, "largest": 1.0}


@dataclass(frozen=True)
class MeasureStatistics:
    """One measure of several runs.

    Attributes:
        measure: which.
        unit: in which the numbers are; empty for a plain number.
        runs: by run, its statistics by name; a plain number has no interval. A run that has not measured it is not
            there.
    """

    measure: Measure
    unit: str
    runs: dict[str, dict[str, Interval | float]]


def statistics_of(runs: "dict[str, pd.DataFrame]") -> list[MeasureStatistics]:
    """All measures that are to be compared and that any of ``runs`` has.

    Raises:
        UserError: as :func:`sinkbench.results.comparison.shared_rows`.
    """
    measures = [
        measure
        for measure in MEASURES.values()
        if measure.compared is not ComparedAs.NONE and any(_known(frame, measure) for frame in runs.values())
    ]
    if not measures and not any(has_reference(frame) for frame in runs.values()):
        return []
    shared = shared_rows(runs)
    values = {
        measure: {
            name: frame[frame[measure.column].notna()] for name, frame in shared.items() if _known(frame, measure)
        }
        for measure in measures
    }
    further = [_statistics(measure, of_runs) for measure, of_runs in values.items() if of_runs]
    return [*(MeasureStatistics(*table) for table in divergence_of(shared)), *further]


def _known(frame: "pd.DataFrame", measure: Measure) -> bool:
    return measure.column in frame and bool(frame[measure.column].notna().any())


def _statistics(measure: Measure, frames: "Mapping[str, pd.DataFrame]") -> MeasureStatistics:
    values = {name: frame[measure.column].to_numpy() for name, frame in frames.items()}
    unit, factor = measure.unit(max(float(known.max()) for known in values.values()))
    if measure.compared is ComparedAs.SHARE:
        unit, factor = "%", 100.0
    runs: dict[str, dict[str, Interval | float]] = {}
    for name, known in values.items():
        check()
        runs[name] = {"mean": interval(known, streams=streams_of(frames[name])).times(factor)}
        if measure.compared is ComparedAs.DISTRIBUTION:
            runs[name] |= {about: float(np.quantile(known, q)) * factor for about, q in QUANTILES.items()}
    return MeasureStatistics(measure, unit, runs)
