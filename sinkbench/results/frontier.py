"""What a budget costs and what it loses: the runs that no other beats in both are the frontier."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sinkbench.results.baseline import sound_length
from sinkbench.results.comparison import shared_rows
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.recall import window_of
from sinkbench.results.run import Run

if TYPE_CHECKING:
    import pandas as pd

KL = "kl"
BUDGET = re.compile(r"[-_. ]?window(?:_size)?[_-]?\d+")  # in a name


@dataclass(frozen=True)
class Budgeted:
    """A run by what it costs and loses.

    Attributes:
        name: of the run.
        strategy: of the run.
        series: what runs that differ in their budget alone have in common: a line in a figure.
        window: entries that it keeps, as far as its record says; ``None`` for dense attention.
        held: bytes that its cache holds at most; ``None`` where they are not known.
        latency: median seconds of a step; ``None`` where none was timed.
        loss: mean NLL minus that of the baseline, nats.
        kl: mean divergence from its reference, nats; ``None`` where the run has none.
        lost: ``kl`` where every run but the baseline has one, else ``loss``: what the frontier is judged by.
        best: whether no other run holds as little, or less, and loses less.
        fastest: whether no other run is as fast, or faster, and loses less; ``None`` where that is not known.
    """

    name: str
    strategy: str
    series: str
    window: int | None
    held: float | None
    latency: float | None
    loss: Interval
    kl: Interval | None
    lost: Interval
    best: bool | None = None
    fastest: bool | None = None


def budgets(runs: Mapping[str, Run], baseline: Run) -> list[Budgeted]:
    """Every run by cost and loss, those of a strategy together, the small ones first.

    Both are over the rows that all runs share; of dense attention as the baseline, up to the length that it was trained
    for.

    Args:
        runs: by name.
        baseline: one of them.

    Raises:
        UserError: the runs predicted different tokens, or share no row.
    """
    shared = shared_rows({name: run.frame for name, run in runs.items()})
    sound = sound_length(baseline)
    if sound and (next(iter(shared.values()))["input_length"] <= sound).any():
        shared = {name: frame[frame["input_length"] <= sound] for name, frame in shared.items()}
    zero = shared[baseline.name]["nll"].to_numpy(float)
    found, series = [], series_of(runs)
    for name, run in runs.items():
        frame = shared[name]
        measured = frame.dropna(subset=[KL]) if KL in frame else frame[:0]
        loss = interval(frame["nll"].to_numpy(float) - zero, streams=streams_of(frame))
        found.append(
            Budgeted(
                name,
                run.strategy,
                series[name],
                window_of(run),
                _held(run, frame),
                _latency(run),
                loss,
                interval(measured[KL].to_numpy(), streams=streams_of(measured)) if len(measured) else None,
                loss,
            )
        )
    if judged_by_kl(found, baseline.name):
        found = [replace(one, lost=one.kl or Interval(0.0, 0.0, 0.0)) for one in found]
    order = list(dict.fromkeys(run.strategy for run in runs.values()))
    found.sort(key=lambda one: (order.index(one.strategy), one.window or 0, one.held or 0))
    best, fastest = _unbeaten(found, [one.held for one in found]), _unbeaten(found, [one.latency for one in found])
    return [replace(one, best=b, fastest=f) for one, b, f in zip(found, best, fastest, strict=True)]


def judged_by_kl(found: Sequence[Budgeted], baseline: str) -> bool:
    """Whether every run has a divergence, but perhaps the baseline, whose own is none."""
    others = [one for one in found if one.name != baseline]
    return bool(others) and all(one.kl is not None for one in others)


def series_of(runs: Mapping[str, Run]) -> dict[str, str]:
    """For each run, its name without the window: by their names, or where records say that only that differs."""
    named = {name: BUDGET.sub("", name).strip("-_. ") or run.strategy for name, run in runs.items()}
    settings: dict[str, list[str]] = {}
    for name, run in runs.items():
        said = run.recorded("determined_by", "strategy")
        if isinstance(said, dict):
            rest = {key: value for key, value in said.items() if key != "window"}
            settings.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(name)
    for alike in settings.values():
        windows = [window_of(runs[name]) for name in alike]
        several = len({named[name] for name in alike}) > 1
        if several and len(set(windows)) == len(windows):
            named |= dict.fromkeys(alike, min((named[name] for name in alike), key=len))
    return named


def _unbeaten(found: Sequence[Budgeted], costs: Sequence[float | None]) -> list[bool | None]:
    """Which runs no other beats in cost and loss; ``None`` where a cost is not known or a loss is no number."""
    known = [(cost, one.lost.value) for cost, one in zip(costs, found, strict=True) if cost is not None]
    return [
        None
        if cost is None or not np.isfinite(one.lost.value)
        else not any(
            (other <= cost and loss < one.lost.value) or (other < cost and loss <= one.lost.value)
            for other, loss in known
        )
        for cost, one in zip(costs, found, strict=True)
    ]


def _held(run: Run, frame: "pd.DataFrame") -> float | None:
    """The most that the cache held over these rows; where they do not say it, over the whole run by its record."""
    rows = frame["kv_cache_bytes"].max() if "kv_cache_bytes" in frame else np.nan
    held = float(rows) if np.isfinite(rows) else run.number("peak_kv_cache_bytes")
    return held if held and held > 0 else None


def _latency(run: Run) -> float | None:
    timed = run.frame["latency"].dropna() if "latency" in run.frame else run.frame["input_length"][:0]
    value = float(timed.median()) if len(timed) else run.number("median_latency")
    return value if value and value > 0 else None
