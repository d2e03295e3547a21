"""How runs over the same tokens differ: perplexities with intervals, what is lost to a baseline, and where."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd

from sinkbench.errors import UserError
from sinkbench.results.documents import mean_by_length, named_place, places_of, streams_of
from sinkbench.results.intervals import Interval, interval
from sinkbench.results.rows import predictions_in, starts_of
from sinkbench.results.run import DENSE
from sinkbench.signals import check

SMOOTH = 256  # tokens over which an NLL level is judged
DIVERGED = 0.05  # nats above the baseline, over SMOOTH tokens, that count as a loss
BROKEN = 0.5  # nats above the best of the runs, over SMOOTH tokens, that count as failure
# Files may be thinned. An onset is judged over the next 256 rows, and where a run fails slowly it seems the earlier the
# more tokens those are. Dense Llama 2 7B: token 4,025 by all rows, 3,210 by every 5th, 2,160 by every 10th.
SPARSE = 5
NO_NUMBER = 1e4  # nats: what an NLL counts for that is no number, where it is asked from which token on a run fails


@dataclass(frozen=True)
class Comparison:
    """One run among others over the same tokens.

    Attributes:
        tokens: how many all runs have read.
        spacing: tokens from one row that all have to the next: more than 1 makes onsets approximate; with more than
            ``SPARSE`` there are none.
        documents: how many streams these tokens are of.
        longest: the most tokens that were read of one of them.
        perplexity: ``exp`` of the mean NLL.
        loss: mean NLL minus that of the baseline over the same tokens, nats; ``None`` without a baseline.
        mean_difference: mean absolute difference of its NLLs to the baseline's, nats, of the rows there are.
        diverges: the first token from which the run loses to the baseline; ``None`` where it never does.
        breaks: the first token from which the run fails against the best of all; ``None`` where it never does.
        fails: whether it fails, also where there are too few rows to say from which token on.
    """

    name: str
    tokens: int
    spacing: int
    documents: int
    longest: int
    perplexity: Interval
    loss: Interval | None
    mean_difference: float | None
    diverges: int | None
    breaks: int | None
    fails: bool


def compare_runs(runs: dict[str, pd.DataFrame], baseline: str | None = DENSE) -> list[Comparison]:
    """Compare runs over the tokens that all of them have read, by the rows that all of them have.

    Where rows were left out, means are those over all tokens, by ``overall_ppl``.

    Args:
        runs: rows by name.
        baseline: one of these; without it, or where it is not among them, losses are ``None``.

    Raises:
        UserError: the runs predicted different tokens, or share no row.
    """
    frames = shared_rows(runs)
    one = next(iter(frames.values()))
    streams, lengths = streams_of(one), one["input_length"].to_numpy()
    places = np.unique(lengths)
    spacing = int(np.median(np.diff(places))) if len(places) > 1 else 1
    nll = {name: frame["nll"].to_numpy(float) for name, frame in frames.items()}
    means = {name: _mean(frame) for name, frame in frames.items()}
    known = {name: np.where(np.isfinite(values), values, NO_NUMBER) for name, values in nll.items()}
    if streams is not None:  # an onset is an input length, at which documents come to their mean
        known = {name: mean_by_length(lengths, values)[1] for name, values in known.items()}
    best, base = _best(list(known.values())), baseline if baseline in nll else None
    compared = []
    for name, values in nll.items():
        check()
        loss = mean_difference = diverges = None
        if base is not None and name != base:
            with np.errstate(invalid="ignore"):  # of two that are infinite
                apart = values - nll[base]
            loss = interval(apart, streams=streams).moved(means[name] - means[base])
            mean_difference = float(np.abs(apart).mean())
            diverges = _onset(known[name] - known[base], DIVERGED)
        breaks = _onset(known[name] - np.where(best < NO_NUMBER, best, 0.0), BROKEN)
        compared.append(
            Comparison(
                name,
                tokens=predictions_in(one),
                spacing=spacing,
                documents=len(starts_of(one)),
                longest=int(places[-1]),
                perplexity=interval(values, streams=streams).moved(means[name]).exp(),
                loss=loss,
                mean_difference=mean_difference,
                diverges=_token(diverges, places, spacing),
                breaks=_token(breaks, places, spacing),
                fails=breaks is not None,
            )
        )
    return compared


def _token(row: int | None, places: np.ndarray, spacing: int) -> int | None:
    """The token of a row (from 1), where there are rows enough to say it."""
    return None if row is None or spacing > SPARSE else int(places[row - 1])


def onset_text(token: int, spacing: int) -> str:
    """An onset, in words: approximate where rows were left out."""
    return f"{'≈ ' if spacing > 1 else ''}{token:,}"


def shared_rows(runs: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Of each run, the rows that all have, one for each place (a document and a length), in order.

    Raises:
        UserError: the runs predicted different tokens, or share no row.
    """
    check_same_tokens(runs)
    places = shared_lengths(runs.values())
    if not len(places):
        raise UserError(f"{' and '.join(runs)} share no row: of none is there an NLL of the same token")
    return {name: _at(frame, places) for name, frame in runs.items()}


def shared_lengths(frames: Iterable[pd.DataFrame]) -> np.ndarray:
    """The places (:func:`places_of`) of which all ``frames`` have a row, in order."""
    return reduce(np.intersect1d, (places_of(frame) for frame in frames))


def _at(frame: pd.DataFrame, places: np.ndarray) -> pd.DataFrame:
    """One row for each of ``places``."""
    known, rows = np.unique(places_of(frame), return_index=True)
    return frame.iloc[rows[np.searchsorted(known, places)]].reset_index(drop=True)


def _mean(frame: pd.DataFrame) -> float:
    """The mean NLL of all tokens up to the last row."""
    last = frame.iloc[-1]
    whole = len(frame) == predictions_in(frame)
    return float(frame["nll"].to_numpy().mean() if whole or "overall_ppl" not in frame else np.log(last["overall_ppl"]))


def check_same_tokens(runs: dict[str, pd.DataFrame]) -> None:
    """Raise where two runs did not predict the same tokens, as far as their files say."""
    differ = first_difference(runs)
    if differ:
        first, name, place = differ
        raise UserError(
            f"{first} and {name} are not over the same tokens: they differ from token {named_place(place)} on; "
            "compare runs of one dataset, column and tokenizer (across tokenizers, sinkbench report has bits per byte)"
        )


def first_difference(runs: dict[str, pd.DataFrame]) -> tuple[str, str, int] | None:
    """Two runs that predicted different tokens, and the first such place; ``None`` where the rows they share agree."""
    known = [
        (name, frame[["token"]].assign(place=places_of(frame)).dropna().drop_duplicates("place"))
        for name, frame in runs.items()
        if "token" in frame
    ]
    known = [(name, frame) for name, frame in known if len(frame)]
    for name, frame in known[1:]:
        first, of_first = known[0]
        both = of_first.merge(frame, on="place")
        differ = both["place"][both["token_x"] != both["token_y"]]
        if len(differ):
            return first, name, int(differ.iloc[0])
    return None


def _ahead(values: np.ndarray) -> np.ndarray:
    """Mean over the next ``SMOOTH`` values, for every start that has as many (or all, where there are fewer)."""
    width = min(SMOOTH, len(values))
    sums = np.cumsum(np.concatenate([[0.0], values]))
    return (sums[width:] - sums[:-width]) / width


def _best(runs: list[np.ndarray]) -> np.ndarray:
    """At each token, the NLL of the run that does best over the tokens ahead."""
    levels = np.stack([_ahead(values) for values in runs]).argmin(axis=0)
    choice = np.concatenate([levels, np.full(len(runs[0]) - len(levels), levels[-1])])
    return np.stack(runs)[choice, np.arange(len(choice))]


def _onset(excess: np.ndarray, threshold: float) -> int | None:
    """The row (from 1) at which a lasting excess begins: over the tokens ahead it exceeds ``threshold`` on average.

    An average sees ahead of the event, so the answer is the first row from there on that is worse by itself.
    """
    lasting = np.flatnonzero(_ahead(excess) > threshold)
    if not lasting.size:
        return None
    worse = np.flatnonzero(excess[lasting[0] :] > min(threshold, 0.01))
    return int(lasting[0] + worse[0]) + 1
