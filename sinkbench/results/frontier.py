"""What a budget costs and what it loses: the runs that no other beats in both are the frontier."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sinkbench.results.comparison import shared_rows
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.recall import window_of
from sinkbench.results.run import DENSE, Run

KL = "kl"


@dataclass(frozen=True)
class Budgeted:
    """A run by what it costs and loses.

    Attributes:
        name: of the run.
        strategy: of the run.
        window: entries that it keeps, as far as its record says; ``None`` for dense attention.
        held: bytes that its cache holds at most; ``None`` where they are not known.
        latency: median seconds of a step; ``None`` where none was timed.
        loss: mean NLL minus that of the baseline, nats.
        kl: mean divergence from its reference, nats; ``None`` where the run has none.
        best: whether no other run holds as little, or less, and loses less.
        fastest: whether no other run is as fast, or faster, and loses less; ``None`` where that is not known.
    """

    name: str
    strategy: str
    window: int | None
    held: float | None
    latency: float | None
    loss: Interval
    kl: Interval | None
    best: bool | None = None
    fastest: bool | None = None


def budgets(runs: Mapping[str, Run], baseline: str) -> list[Budgeted]:
    """Every run by cost and loss, those of a strategy together, the small ones first.

    Losses are over the rows that all runs share, cost is that of the whole run.

    Args:
        runs: by name.
        baseline: one of them.

    Raises:
        UserError: the runs predicted different tokens, or share no row.
    """
    shared = shared_rows({name: run.frame for name, run in runs.items()})
    zero = shared[baseline]["nll"].to_numpy(float)
    found = []
    for name, run in runs.items():
        frame = shared[name]
        kl = frame[KL].dropna().to_numpy() if KL in frame else np.empty(0)
        found.append(
            Budgeted(
                name,
                run.strategy,
                window_of(run),
                _largest(run, "kv_cache_bytes", "peak_kv_cache_bytes"),
                _latency(run),
                interval(frame["nll"].to_numpy(float) - zero),
                interval(kl) if len(kl) else None,
            )
        )
    order = list(dict.fromkeys(run.strategy for run in runs.values()))
    found.sort(key=lambda one: (order.index(one.strategy), one.window or 0, one.held or 0))
    best, fastest = _unbeaten(found, [one.held for one in found]), _unbeaten(found, [one.latency for one in found])
    return [replace(one, best=b, fastest=f) for one, b, f in zip(found, best, fastest, strict=True)]


def _unbeaten(found: Sequence[Budgeted], costs: Sequence[float | None]) -> list[bool | None]:
    """Which runs no other beats in cost and loss; ``None`` where a cost is not known or a loss is no number."""
    known = [(cost, one.loss.value) for cost, one in zip(costs, found, strict=True) if cost is not None]
    return [
        None
        if cost is None or not np.isfinite(one.loss.value)
        else not any(
            (other <= cost and loss < one.loss.value) or (other < cost and loss <= one.loss.value)
            for other, loss in known
        )
        for cost, one in zip(costs, found, strict=True)
    ]


def _largest(run: Run, column: str, key: str) -> float | None:
    values = [run.frame[column].max() if column in run.frame else None, run.number(key)]
    known = [float(value) for value in values if value is not None and np.isfinite(value) and value > 0]
    return max(known, default=None)


def _latency(run: Run) -> float | None:
    timed = run.frame["latency"].dropna() if "latency" in run.frame else run.frame["input_length"][:0]
    value = float(timed.median()) if len(timed) else run.number("median_latency")
    return value if value and value > 0 else None


def is_dense(one: Budgeted) -> bool:
    """Whether a run keeps everything, so that what it holds grows with the text."""
    return one.strategy == DENSE
