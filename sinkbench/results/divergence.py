"""How far runs are from their reference (``--reference``): the statistics of ``llama-perplexity --kl-divergence``.

All of them come with 95 % intervals by a block bootstrap, or over documents, as tokens are not independent; but for the
largest, of which a bootstrap says nothing.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkbench.results.columns import MEASURES, Measure
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.signals import check

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "99.9 %": 0.999}
AGREEMENT = Measure(
    "",
    "Agreement with the reference",
    "How often both have the same most likely token; Δp, the probability of the token that comes less that under "
    "the reference, its mean and root mean square; ln of the perplexity over that of the reference",
)
Statistics = dict[str, Interval | float]


def divergence_of(runs: "Mapping[str, pd.DataFrame]") -> list[tuple[Measure, str, dict[str, Statistics]]]:
    """Measure, unit, and by run the statistics by name, of the ``runs`` that have a reference; over all their rows."""
    known = {name: frame for name, frame in runs.items() if has_reference(frame)}
    if not known:
        return []
    tables: list[tuple[Measure, str, Callable[[pd.DataFrame], Statistics]]] = [
        (MEASURES["kl"], "nats", divergences),
        (AGREEMENT, "", agreement),
    ]
    found = []
    for measure, unit, statistics in tables:
        by_run = {}
        for name, frame in known.items():
            check()
            by_run[name] = statistics(frame)
        found.append((measure, unit, by_run))
    return found


def has_reference(frame: "pd.DataFrame") -> bool:
    """Whether these rows hold the divergence from a reference."""
    return all(name in frame and frame[name].notna().any() for name in ("kl", "same_top", "reference_nll"))


def divergences(frame: "pd.DataFrame") -> Statistics:
    """The distribution of ``kl``."""
    rows = frame[frame["kl"].notna()]
    return distribution(rows["kl"].to_numpy(), streams_of(rows))


def distribution(values: np.ndarray, streams: np.ndarray | None = None) -> Statistics:
    """Mean, quantiles and largest of ``values``; ``streams`` has the document of each, where there are several."""
    ordered = np.sort(values)
    return {
        "mean": interval(values, streams=streams),
        **{name: quantile(values, ordered, share, streams) for name, share in QUANTILES.items()},
        "largest": float(ordered[-1]),
    }


def quantile(values: np.ndarray, ordered: np.ndarray, share: float, streams: np.ndarray | None = None) -> Interval:
    """The value below which this ``share`` of ``values`` lies, and its interval (Woodruff, 1952).

    The share of values up to the quantile has an interval by the block bootstrap; the quantiles at its ends are those
    of the quantile.
    """
    value = float(np.quantile(ordered, share))
    below = interval((values <= value).astype(float), streams=streams).moved(share)
    low, high = (float(np.quantile(ordered, min(max(end, 0.0), 1.0))) for end in (below.low, below.high))
    return Interval(value, low, high)


def agreement(frame: "pd.DataFrame") -> Statistics:
    """How often both would say the same, and what each gives the token that comes."""
    rows = frame.dropna(subset=["nll", "same_top", "reference_nll"])
    nll, reference = rows["nll"].to_numpy(), rows["reference_nll"].to_numpy()
    streams = streams_of(rows)
    more = np.exp(-nll) - np.exp(-reference)
    square = interval(more**2, streams=streams)
    return {
        "same top (%)": interval(rows["same_top"].to_numpy(), streams=streams).times(100.0),
        "mean Δp (%)": interval(more, streams=streams).times(100.0),
        "RMS Δp (%)": Interval(*(float(np.sqrt(x)) for x in (square.value, square.low, square.high))).times(100.0),
        "ln ppl ratio": interval(nll - reference, streams=streams),
    }


def beyond_training(record: Mapping[str, Any], length: int) -> str | None:
    """What to say where a record names a reference that is read beyond what its model was trained for; else ``None``.

    Args:
        length: tokens read.
    """
    reference, model = record.get("reference"), record.get("model")
    trained = model.get("context_length") if isinstance(model, dict) else None
    if not isinstance(reference, dict) or not isinstance(trained, int):
        return None
    span = reference.get("span")
    if min(length, span if isinstance(span, int) else length) <= trained:
        return None
    return (
        f"the reference, {reference.get('strategy')}, is read beyond the {trained:,} tokens the model was trained for: "
        "from there on it is no reference"
    )
