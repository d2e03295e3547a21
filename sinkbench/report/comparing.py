"""Runs of one folder over the tokens that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
import pandas as pd

from sinkbench.compare import SMOOTH, Comparison, Interval, compare
from sinkbench.report.gathering import Run
from sinkbench.report.measuring import scaled

# An onset is judged over the next 256 rows, and of a run that fails slowly it is told the earlier the more tokens
# those are. Dense Llama 2 7B: token 4,025 by all rows, 3,210 by every 5th, 2,160 by every 10th.
SPARSE = 5


@dataclass(frozen=True)
class Onset:
    """The token from which a run fails against the best of the others, as well as it can be told.

    Attributes:
        token: ``None`` where the run holds.
        spacing: tokens from one row to the next: more than 1 makes ``token`` approximate.
    """

    token: int | None
    spacing: int = 1


@dataclass(frozen=True)
class Shared:
    """What a group of runs over the same tokens shows.

    Attributes:
        tokens: how many all runs share.
        spacing: tokens from one row that they share to the next.
        compared: each run over these.
        onsets: by run, each against all that have read as far; a run that cannot be judged is not in it.
        untold: why some are not in ``onsets``; empty where all are.
    """

    tokens: int
    spacing: int
    compared: list[Comparison]
    onsets: dict[str, Onset]
    untold: str = ""


def compare_runs(runs: Sequence[Run]) -> Shared | None:
    """Compare runs over the same tokens; ``None`` where fewer than two share the 256 rows that it takes."""
    frames = {run.name: frame for run in runs if len(frame := _sound(run.frame)) >= SMOOTH}
    frames = dict(sorted(frames.items(), key=lambda item: _length(item[1]), reverse=True))
    aligned = _aligned(frames)
    if len(frames) < 2 or _rows(aligned) < SMOOTH:
        return None
    baseline = next((run.name for run in runs if run.strategy == "transformers"), "transformers")
    places, spacing = _places(aligned)
    told = {
        comparison.name: _over_all(_at(comparison, places, spacing), aligned, baseline)
        for comparison in compare(aligned, baseline)
    }
    onsets, untold = _onsets(frames, baseline)
    return Shared(int(places[-1]), spacing, [told[run.name] for run in runs if run.name in told], onsets, untold)


def _sound(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with an NLL, one for each length, in order; without tokens, which have been checked."""
    kept = frame[np.isfinite(frame["nll"])].drop_duplicates("input_length")
    return kept.sort_values("input_length").drop(columns="token")


def _length(frame: pd.DataFrame) -> int:
    return int(frame["input_length"].iloc[-1])


def _rows(frames: dict[str, pd.DataFrame]) -> int:
    return min(map(len, frames.values()), default=0)


def _aligned(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows that all ``frames`` have."""
    if not frames:
        return {}
    shared = reduce(np.intersect1d, (frame["input_length"].to_numpy() for frame in frames.values()))
    return {name: frame[frame["input_length"].isin(shared)].reset_index(drop=True) for name, frame in frames.items()}


def _places(aligned: dict[str, pd.DataFrame]) -> tuple[np.ndarray, int]:
    """The lengths at which there are rows, and how far these usually lie apart."""
    places = next(iter(aligned.values()))["input_length"].to_numpy()
    return places, int(np.median(np.diff(places)))


def _at(comparison: Comparison, places: np.ndarray, spacing: int) -> Comparison:
    """``comparison`` of rows, with tokens for rows; too sparse ones do not tell a token."""
    rows = (comparison.diverges, comparison.breaks) if spacing <= SPARSE else (None, None)
    diverges, breaks = (None if row is None else int(places[row - 1]) for row in rows)
    return replace(comparison, diverges=diverges, breaks=breaks)


def _over_all(comparison: Comparison, aligned: dict[str, pd.DataFrame], baseline: str) -> Comparison:
    """``comparison`` with the means over all tokens, which ``overall_ppl`` tells where rows were left out too."""
    overall = {name: float(frame["overall_ppl"].iloc[-1]) for name, frame in aligned.items()}
    own, loss = overall[comparison.name], comparison.loss
    if loss is not None and np.isfinite(shift := np.log(own / overall[baseline]) - loss.value):
        loss = Interval(loss.value + shift, loss.low + shift, loss.high + shift)
    return replace(comparison, perplexity=scaled(comparison.perplexity, own), loss=loss)


def _onsets(frames: dict[str, pd.DataFrame], baseline: str) -> tuple[dict[str, Onset], str]:
    """Where each run fails, against all that have read at least as far as it, or as one that is shorter.

    The shortest run decides how many tokens all share, and would hide what happens to the others behind its end.
    """
    onsets: dict[str, Onset] = {}
    untold = ""
    for length in sorted({_length(frame) for frame in frames.values()}):
        peers = _aligned({name: frame for name, frame in frames.items() if _length(frame) >= length})
        if len(peers) < 2 or _rows(peers) < SMOOTH:
            continue
        places, spacing = _places(peers)
        if spacing > SPARSE:
            untold = f"the runs share one row in {spacing}, too few to tell"
            continue
        for run in compare(peers, baseline):
            token = _at(run, places, spacing).breaks
            known = onsets.get(run.name)
            if known is None or (known.token is None and token is not None):
                onsets[run.name] = Onset(token, spacing)
    return onsets, untold
