"""What looks wrong with a measurement: one small function a warning.

Thresholds were set on the results in this repository and on those of the ``attention_sinks`` benchmark: sound runs
stay clearly below them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from sinkbench.results.comparison import first_difference
from sinkbench.results.divergence import beyond_training
from sinkbench.results.documents import named_place, places_of
from sinkbench.results.record import RUNNING
from sinkbench.results.report.collect import Group
from sinkbench.results.rows import starts_of
from sinkbench.results.run import Run
from sinkbench.results.transforms import smoothed

SLOW = 2.0  # times the median: warm steps never reach it, cold ones are 5 to 40 times as slow
WARM_UP = 0.02  # of all time; the benchmark's own cold first step is 1.5 % of its shortest run
JITTER = 2.0  # p99 against the steps around it; 1.03 on a quiet GPU, 1.4 at most in the benchmark's runs
DRIFT = 1.3  # slowest against fastest tenth of steps of equal work; 1.006 on a quiet GPU
BLOCKS = 10
ROUNDING = 1e-3  # nats; float32 sums of the benchmark come within 1e-6
ENOUGH = 100  # steps without which a p99 or a tenth means nothing
# What runs in one folder should have in common: where a record says it, and what comes of a difference.
MIXED: dict[str, tuple[tuple[str, ...], str]] = {
    "mixed models": (("model", "name"), "the runs are not compared with each other"),
    "mixed revisions": (("model", "revision"), "a difference in perplexity may be that of the weights"),
    "mixed protocols": (("options", "protocol"), "perplexities are over different predictions"),
    "mixed devices": (("device",), "latency and memory cannot be compared"),
    "mixed dtypes": (("dtype",), "a difference in any number may be that of the dtype"),
    **{
        f"mixed versions of {package}": (("versions", package), "a difference may be that of the versions")
        for package in ("sinkbench", "torch", "transformers")
    },
}


@dataclass(frozen=True)
class ReportWarning:
    """A reason not to trust a number.

    Attributes:
        kind: a few words, the same for all warnings of a kind.
        runs: whom it concerns.
        message: what was seen, and what it means for the numbers.
    """

    kind: str
    runs: tuple[str, ...]
    message: str

    @property
    def whose(self) -> str:
        """Whom it concerns, in a word or two; empty where no run is concerned."""
        return self.runs[0] if len(self.runs) == 1 else f"{len(self.runs)} runs" if self.runs else ""


RunCheck: TypeAlias = Callable[[Run], ReportWarning | None]
GroupCheck: TypeAlias = Callable[[Sequence[Run]], Iterator[ReportWarning]]


def find_warnings(group: Group) -> list[ReportWarning]:
    """All warnings about ``group``; what is said of several runs in the same words, once."""
    found = [ReportWarning("unreadable file", (), line) for line in group.unreadable]
    checks = [check for check in GROUP_CHECKS if not (group.generated and check is different_tokens)]
    for check in checks:
        found += check(group.runs)
    of_runs = [warning for run in group.runs for check in RUN_CHECKS if (warning := check(run))]
    by_text: dict[tuple[str, str], list[str]] = {}
    for warning in of_runs:
        by_text.setdefault((warning.kind, warning.message), []).extend(warning.runs)
    return [*found, *(ReportWarning(kind, tuple(runs), message) for (kind, message), runs in by_text.items())]


def warm_up(run: Run) -> ReportWarning | None:
    """The first steps are slow, and few others make up for it."""
    latency = _latency(run)
    cold = _cold(latency)
    excess = float((latency[:cold] - np.median(latency)).sum()) / max(latency.sum(), 1e-12) if cold else 0.0
    if excess < WARM_UP:
        return None
    message = (
        f"the first {_counted(cold, 'step')} took more than {SLOW:g} times the median, {excess:.0%} of the time of "
        "all steps: means and tokens a second include this warm-up; the median hardly does"
    )
    return ReportWarning("warm-up", (run.name,), message)


def noisy_latency(run: Run) -> ReportWarning | None:
    """Single steps are much slower than those around them."""
    latency = run.frame["latency"].dropna().iloc[_cold(_latency(run)) :]
    if len(latency) < ENOUGH:
        return None
    ratio = float(np.quantile(latency / smoothed(latency), 0.99))
    if not ratio > JITTER:
        return None
    message = (
        f"one step in 100 took more than {ratio:.1f} times as long as the steps around it: something else used the "
        "machine; do not rely on p99"
    )
    return ReportWarning("noisy latency", (run.name,), message)


def drifting_latency(run: Run) -> ReportWarning | None:
    """Steps of equal work, those with a full cache, were not equally fast over the run."""
    held = run.frame["kv_cache_bytes"]
    latency = run.frame["latency"][held == held.max()].dropna().to_numpy()
    if len(latency) < ENOUGH:
        return None
    tenths = [float(np.median(part)) for part in np.array_split(latency, BLOCKS)]
    if not max(tenths) > DRIFT * min(tenths) > 0:
        return None
    message = (
        f"with a full cache, the median step took {1e3 * min(tenths):.3g} ms in the fastest tenth of the run and "
        f"{1e3 * max(tenths):.3g} ms in the slowest: the machine's speed changed meanwhile"
    )
    return ReportWarning("noisy latency", (run.name,), message)


def backward_clock(run: Run) -> ReportWarning | None:
    """Time went backwards."""
    negative = int((run.frame["latency"] < 0).sum())
    if negative:
        return ReportWarning(
            "clock went backwards", (run.name,), f"{_counted(negative, 'step')} took less than no time"
        )
    started, ended = _time(run, "started"), _time(run, "ended")
    if started and ended and ended < started:
        message = f"it ended at {ended:%Y-%m-%d %H:%M:%S} and started at {started:%Y-%m-%d %H:%M:%S}"
        return ReportWarning("clock went backwards", (run.name,), message)
    return None


def broken_rows(run: Run) -> ReportWarning | None:
    """``input_length`` does not rise evenly: rows are missing, repeated or out of order."""
    lengths = run.frame["input_length"].to_numpy()
    if not lengths.size or run.recorded("protocol"):  # windows leave tokens out
        return None
    starts, spacing = starts_of(run.frame), run.spacing
    late = starts[lengths[starts] > spacing]
    steps = np.diff(places_of(run.frame))
    back = np.flatnonzero(steps <= 0)
    steps[starts[1:] - 1] = 0
    gaps = np.flatnonzero(steps > spacing)
    if back.size:
        what = f"after {lengths[back[0]]:,.0f} tokens the file goes on at {lengths[back[0] + 1]:,.0f}"
    elif late.size:
        what = f"the first row is that of {lengths[late[0]]:,.0f} tokens"
    elif gaps.size:
        what = f"{lengths[gaps[0]]:,.0f} tokens are followed by {lengths[gaps[0] + 1]:,.0f}"
    else:
        return None
    return ReportWarning("rows missing or repeated", (run.name,), f"{what}: parts of two runs, or an edited file")


def record_of_another(run: Run) -> ReportWarning | None:
    """The record and the rows do not belong together."""
    rows, length, overall = run.number("rows"), run.length, run.number("overall_ppl")
    if rows is None or not (rows or length) or run.recorded("protocol"):
        return None
    if not 0 <= rows - length < run.spacing:
        message = f"the record says {_counted(int(rows), 'row')}, the file ends after {_counted(length, 'token')}"
        return ReportWarning("record does not fit", (run.name,), f"{message}: it was cut, or belongs to another run")
    last = float(run.frame["overall_ppl"].iloc[-1]) if length == rows else np.nan
    if overall is not None and abs(last - overall) > 1e-6 * abs(overall):
        message = f"the record says a perplexity of {overall:.6g}, the file {last:.6g}: it belongs to another run"
        return ReportWarning("record does not fit", (run.name,), message)
    return None


def wrong_perplexity(run: Run) -> ReportWarning | None:
    """NLLs that are no numbers, or that do not come to the perplexity beside them."""
    nll = run.frame["nll"].to_numpy()
    wrong = int((~np.isfinite(nll)).sum())
    if wrong:
        message = f"{_counted(wrong, 'NLL')} of {len(nll):,} is not a finite number: perhaps the dtype overflows"
        return ReportWarning(
            "NLL is not a number", (run.name,), message.replace(" is ", " are ") if wrong > 1 else message
        )
    overall = float(run.frame["overall_ppl"].iloc[-1]) if nll.size else np.nan
    whole = nll.size and len(nll) == run.length
    if whole and overall > 0 and np.isfinite(overall) and abs(np.log(overall) - nll.mean()) > ROUNDING:
        message = f"the last overall_ppl is {overall:.6g}, but the NLLs come to {np.exp(nll.mean()):.6g}"
        return ReportWarning("perplexity does not fit", (run.name,), message)
    return None


def no_reference(run: Run) -> ReportWarning | None:
    """The divergence is from a reference that the model was not trained for."""
    message = beyond_training(run.record, run.length)
    return ReportWarning("no reference", (run.name,), message) if message else None


def unfinished(run: Run) -> ReportWarning | None:
    """The record was never closed."""
    if run.recorded("exit_reason") != RUNNING:
        return None
    message = f"its record still says that it is running, after {_counted(run.length, 'token')}: it was killed"
    return ReportWarning("never ended", (run.name,), f"{message}, or goes on")


def mixed(runs: Sequence[Run]) -> Iterator[ReportWarning]:
    """Runs in one folder that differ in more than their strategy."""
    for kind, (keys, effect) in MIXED.items():
        found: dict[str, list[str]] = {}
        for run in runs:
            value = run.recorded(*keys)
            if value is not None:
                found.setdefault(str(value), []).append(run.name)
        if len(found) > 1:
            shown = "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())
            yield ReportWarning(kind, tuple(name for names in found.values() for name in names), f"{shown}: {effect}")


def different_tokens(runs: Sequence[Run]) -> Iterator[ReportWarning]:
    """Runs that did not read the same text."""
    differ = first_difference({run.name: run.frame for run in runs})
    if differ:
        first, other, place = differ
        message = (
            f"{first} and {other} differ from token {named_place(place)} on: the runs are not compared with each other"
        )
        yield ReportWarning("different tokens", (first, other), message)
        return
    seen: dict[float, tuple[str, str]] = {}
    for run in runs:
        count, digest = run.number("dataset", "tokens"), run.recorded("dataset", "sha256")
        if count is None or not isinstance(digest, str):
            continue
        first, known = seen.setdefault(count, (run.name, digest))
        if digest != known:
            message = f"the records of {first} and {run.name} name different fingerprints of {count:,.0f} tokens: "
            yield ReportWarning(
                "different tokens", (first, run.name), message + "the runs are not compared with each other"
            )
            return


def at_once(runs: Sequence[Run]) -> Iterator[ReportWarning]:
    """Timed runs that shared a machine."""
    spans = []
    for run in runs:
        started, ended = _time(run, "started"), _time(run, "ended")
        if started and ended and len(_latency(run)) and not run.recorded("resumed_at"):
            spans.append((started, ended, run))
    spans.sort(key=lambda span: span[:2])
    for (_, ended, first), (started, _, second) in pairwise(spans):
        if started < ended and first.recorded("device") == second.recorded("device"):
            message = f"{first.name} and {second.name} ran at the same time: if on one machine, both were slower for it"
            yield ReportWarning("ran at the same time", (first.name, second.name), message)


RUN_CHECKS: tuple[RunCheck, ...] = (
    unfinished,
    no_reference,
    broken_rows,
    record_of_another,
    wrong_perplexity,
    backward_clock,
    warm_up,
    noisy_latency,
    drifting_latency,
)
GROUP_CHECKS: tuple[GroupCheck, ...] = (different_tokens, mixed, at_once)


def _latency(run: Run) -> np.ndarray:
    return run.frame["latency"].dropna().to_numpy()


def _cold(latency: np.ndarray) -> int:
    """How many steps are slow before the first that is not; 0 where that is not the beginning only."""
    if not latency.size:
        return 0
    warm = np.flatnonzero(latency <= SLOW * np.median(latency))
    return int(warm[0]) if warm.size else 0


def _time(run: Run, key: str) -> datetime | None:
    """When it ``started`` or ``ended``, as its record says."""
    try:
        found = datetime.fromisoformat(str(run.recorded(key)))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
