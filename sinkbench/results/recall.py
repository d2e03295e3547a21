"""Loss by recall distance: how far back a token must be remembered, and what a strategy loses of such tokens.

For the prediction of a token, the distance is that to the last earlier occurrence of the n-gram that it ends; of pairs,
that is where the token was last seen after the one before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sinkbench.errors import UserError
from sinkbench.results.baseline import sound_length
from sinkbench.results.comparison import shared_rows
from sinkbench.results.documents import streams_of
from sinkbench.results.intervals import Interval
from sinkbench.results.onset import recall_onset
from sinkbench.results.resampling import GroupSums, group_sums
from sinkbench.results.run import DENSE, Run

if TYPE_CHECKING:
    import pandas as pd

DISTANCE = "recall_distance"  # a column: tokens back, 0 where the n-gram was never seen before
BANDS = 6  # runs up to which figures show intervals
LEAST = 8  # tokens of an octave that figures show


@dataclass(frozen=True)
class Recalled:
    """Tokens of some distances.

    Attributes:
        low: the least distance among them; ``None`` for tokens whose n-gram was never seen before.
        high: the first distance beyond; ``None`` where there is no bound.
        tokens: how many.
        share: of all tokens.
        loss: mean NLL minus that of the baseline, nats; ``None`` where there is no token.
        share_of_loss: part of the sum of all losses, which may be negative or above 1 where losses differ in sign;
            ``None`` where that sum is 0.
    """

    low: int | None
    high: int | None
    tokens: int
    share: float
    loss: Interval | None
    share_of_loss: float | None


@dataclass(frozen=True)
class RunRecall:
    """What a run loses, by distance.

    Attributes:
        name: of the run.
        strategy: of the run.
        window: entries that it keeps, as far as its record says.
        first: the first token (its input length) that counts.
        last: the last one.
        whole: all tokens.
        octaves: distances from each power of two up to the next, as far as there are any.
        never: tokens whose n-gram was never seen before.
        within: those seen within the window; ``None`` where that is not known.
        beyond: those seen before, but not within the window; ``None`` where that is not known.
        onset: the distance at which the loss sets in; ``None`` where it does not by distance.
        not_finite: tokens left out because an NLL is no number.
    """

    name: str
    strategy: str
    window: int | None
    first: int
    last: int
    whole: Recalled
    octaves: list[Recalled]
    never: Recalled
    within: Recalled | None
    beyond: Recalled | None
    onset: int | None
    not_finite: int


def recall_by_distance(
    runs: Mapping[str, Run], baseline: Run, ngram: int = 2, tokens: tuple[int | None, int | None] = (None, None)
) -> list[RunRecall]:
    """The loss of each run against ``baseline``, by distance.

    Args:
        runs: by name, the baseline among them.
        baseline: which is left out of the answer.
        ngram: tokens of an n-gram, 2 or more.
        tokens: the first and the last input length that counts. By default those behind the window of each run, as
            nothing is lost before; and of dense attention as the baseline, up to the length that it was trained for.

    Raises:
        UserError: no run has every token, the runs predicted different ones, or none is left.
    """
    if ngram < 2:
        raise UserError(f"--ngram is {ngram}: give 2 or more")
    frames = {name: run.frame for name, run in runs.items()}
    whole = next((name for name, frame in frames.items() if _is_whole(frame)), None)
    if whole is None:
        raise UserError(_why_none(runs))
    measured = frames[whole].assign(**{DISTANCE: recall_distances(frames[whole], ngram)})
    shared = shared_rows(frames | {whole: measured})
    distances = shared[whole][DISTANCE].to_numpy().astype(np.int64)
    lengths, streams = shared[whole]["input_length"].to_numpy(), streams_of(shared[whole])
    of_baseline = shared[baseline.name]["nll"].to_numpy(float)
    found = []
    for name, run in runs.items():
        if name == baseline.name:
            continue
        first, last = _bounds(run, baseline, tokens)
        counted = (lengths >= first) & (lengths <= last)
        if not counted.any():
            raise UserError(f"no token of {name} is from {first:,} to {last:,}: give other --tokens FIRST:LAST")
        losses = shared[name]["nll"].to_numpy(float)[counted] - of_baseline[counted]
        read = int(lengths[counted].min()), int(lengths[counted].max())
        own = streams if streams is None else streams[counted]
        found.append(_of_run(run, losses, distances[counted], read, own))
    return found


def recall_distances(frame: "pd.DataFrame", ngram: int) -> np.ndarray:
    """How many tokens back the n-gram that each token ends was last seen, 0 where it never was; int64.

    Each stream begins where ``input_length`` is 1 and remembers nothing of others. The token that a stream begins with
    stands in no file, so n-grams with it count as never seen. N-grams are numbered exactly, by sorting.
    """
    tokens = frame["token"].to_numpy()
    streams = np.cumsum(frame["input_length"].to_numpy() == 1)
    distances = np.zeros(len(tokens), np.int64)
    if ngram > len(tokens):
        return distances
    ids, size = _numbered(tokens), 1
    while size < ngram:  # two n-grams that overlap, or touch, make a longer one
        step = min(size, ngram - size)
        ids = _joined(ids[:-step], ids[step:])
        size += step
    starts = streams[: len(ids)]
    if streams[-1] > 1:
        ids = _joined(_numbered(starts), ids)
    order = np.argsort(ids, kind="stable")
    again = ids[order][1:] == ids[order][:-1]
    ends = order + ngram - 1
    distances[ends[1:][again]] = np.diff(order)[again]
    # of what reaches over the end of a stream, there is no n-gram
    distances[ngram - 1 :][starts != streams[ngram - 1 :]] = 0
    return distances


def window_of(run: Run) -> int | None:
    """The entries that ``run`` keeps, as far as its record says; ``None`` also for dense attention."""
    if run.strategy == DENSE:
        return None
    window = run.number("determined_by", "strategy", "window") or run.number("options", "window_size")
    return int(window) if window and window >= 1 else None


def drawn_octaves(run: RunRecall) -> list[Recalled]:
    """The octaves with tokens enough for a figure."""
    return [octave for octave in run.octaves if octave.tokens >= LEAST]


def middle(octave: Recalled) -> float:
    """Where on a logarithmic axis (to base 2) an octave is drawn."""
    low, high = octave.low or 1, octave.high or 2
    return float(np.log2(low * high) / 2)


def _numbered(values: np.ndarray) -> np.ndarray:
    return np.unique(values, return_inverse=True)[1]


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """A number for each pair of numbers, both less than 2^31."""
    return _numbered(one.astype(np.int64) * (int(other.max()) + 1) + other)


def _is_whole(frame: "pd.DataFrame") -> bool:
    """Whether a row is there of every token, and says which."""
    lengths = frame["input_length"].to_numpy()
    if not len(lengths) or lengths[0] != 1 or "token" not in frame or frame["token"].isna().any():
        return False
    return bool(((np.diff(lengths) == 1) | (lengths[1:] == 1)).all())


def _why_none(runs: Mapping[str, Run]) -> str:
    windows = next((name for name, run in runs.items() if run.recorded("protocol")), None)
    if windows is not None:
        return (
            f"no run has a row of every token, which distances need: {windows} is of --protocol windows, which leave "
            "tokens out; give a run of the whole stream too"
        )
    frames = {name: run.frame for name, run in runs.items()}
    if any("token" in frame and frame["token"].notna().any() for frame in frames.values()):
        return "no run has a row of every token, which distances need: give one that was not thinned"
    return (
        f"{' and '.join(frames)} do not say which tokens they predicted (no column token), which distances need: run "
        "the experiments again"
    )


def _bounds(run: Run, baseline: Run, tokens: tuple[int | None, int | None]) -> tuple[int, int]:
    first, last = tokens
    longest = int(run.frame["input_length"].max())
    if first is None:
        first = 1 + (window_of(run) or 0)
        first = first if first < longest else 1
    if last is None:
        sound = sound_length(baseline)
        last = sound if sound and sound > first else max(longest, first)
    return first, last


def _of_run(
    run: Run, losses: np.ndarray, distances: np.ndarray, read: tuple[int, int], streams: np.ndarray | None
) -> RunRecall:
    finite = np.isfinite(losses)
    losses, distances = losses[finite], distances[finite]
    streams = streams if streams is None else streams[finite]
    if not len(losses):
        raise UserError(f"no NLL of {run.name} is a number where that of the baseline is one")
    window = window_of(run)
    # group 0: never seen; then two groups an octave, which part at the window where that lies within
    octaves = np.where(distances > 0, np.frexp(distances)[1], 0)
    far = distances > (window or 0)
    groups = 2 * octaves + far
    count = 2 * (int(octaves.max()) + 1)
    sums = group_sums(losses, groups, count, streams=streams)
    every, near, beyond = list(range(count)), list(range(2, count, 2)), list(range(3, count, 2))
    return RunRecall(
        run.name,
        run.strategy,
        window,
        *read,
        whole=_recalled(sums, every, 1, None),
        octaves=[
            _recalled(sums, pair, 2 ** (octave - 1), 2**octave)
            for octave in range(1, count // 2)
            if sums.tokens(pair := [2 * octave, 2 * octave + 1])
        ],
        never=_recalled(sums, [0, 1], None, None),
        within=_recalled(sums, near, 1, window + 1) if window else None,
        beyond=_recalled(sums, beyond, window + 1, None) if window else None,
        onset=recall_onset(losses, distances, streams),
        not_finite=int((~finite).sum()),
    )


def _recalled(sums: GroupSums, groups: list[int], low: int | None, high: int | None) -> Recalled:
    tokens, every = sums.tokens(groups), list(range(sums.counts.shape[1]))
    total = sums.total(every)
    share = sums.total(groups) / total if total else None
    return Recalled(low, high, tokens, tokens / sums.tokens(every), sums.mean(groups), share)
