"""What one run comes to: the numbers of its line in the table."""

from dataclasses import dataclass

import numpy as np

from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.record import FINISHED, OUT_OF_MEMORY
from sinkbench.results.run import Run
from sinkbench.results.units import Units, spelled_by, units_of


@dataclass(frozen=True)
class RunSummary:
    """The final numbers of a run, over all its rows; ``None`` is what it did not measure.

    Attributes:
        tokens: how many it has read.
        perplexity: ``exp`` of the mean NLL, with its 95 % interval.
        units: the same in units of the text.
        peak_vram: GiB.
        kv_cache_bytes: at most.
        median_latency: seconds a step.
        p99_latency: seconds.
        tokens_per_second: over the whole run, as its record says.
        outcome: why it ended; empty where it finished, or where that is not known.
    """

    tokens: int
    perplexity: Interval | None
    units: Units | None
    peak_vram: float | None
    kv_cache_bytes: int | None
    median_latency: float | None
    p99_latency: float | None
    tokens_per_second: float | None
    outcome: str


def summarise(run: Run) -> RunSummary:
    """The numbers of ``run``. The record's peaks count too: a file of fewer rows may have lost the highest."""
    latency = run.frame["latency"].dropna().to_numpy()
    perplexity = final_perplexity(run)
    held = _peak(run, "kv_cache_bytes", "peak_kv_cache_bytes")
    return RunSummary(
        tokens=run.length,
        perplexity=perplexity,
        units=units_of(perplexity, spelled_by(run)),
        peak_vram=_peak(run, "cuda_vram_allocated", "peak_vram_gib"),
        kv_cache_bytes=None if held is None else int(held),
        median_latency=float(np.median(latency)) if latency.size else None,
        p99_latency=float(np.quantile(latency, 0.99)) if latency.size else None,
        tokens_per_second=run.number("tokens_per_second") or None,
        outcome=_outcome(run),
    )


def _outcome(run: Run) -> str:
    reason = str(run.recorded("exit_reason") or "")
    if reason == OUT_OF_MEMORY:
        return f"{reason} after {run.length:,} tokens"
    return "" if reason == FINISHED else reason


def final_perplexity(run: Run) -> Interval | None:
    """The run's own last ``overall_ppl``, which is over all tokens, with the interval that the rows there are give."""
    nll = run.frame["nll"].to_numpy()
    known = np.isfinite(nll)
    streams = streams_of(run.frame)
    if not len(run.frame):
        return None
    last = float(run.frame["overall_ppl"].iloc[-1])
    if not np.isfinite(last):
        return Interval(last, last, last)  # of what a model that overflows comes to
    nll, streams = nll[known], None if streams is None else streams[known]
    return interval(nll, streams=streams).moved(np.log(last) if last > 0 else np.nan).exp()


def _peak(run: Run, column: str, key: str) -> float | None:
    values = [run.frame[column].max(), run.number(key)]
    known = [float(value) for value in values if value is not None and np.isfinite(value)]
    return max(known, default=None)
