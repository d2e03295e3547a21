"""Runs of one folder over the tokens that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sinkbench.results.baseline import Baseline, choose_baseline
from sinkbench.results.comparison import SMOOTH, SPARSE, Comparison, compare_runs, shared_lengths
from sinkbench.results.documents import places_of
from sinkbench.results.rows import predictions_in
from sinkbench.results.run import Run
from sinkbench.results.statistics import MeasureStatistics, statistics_of


@dataclass(frozen=True)
class Onset:
    """The token from which a run fails against the best of the others.

    Attributes:
        token: ``None`` where the run holds.
        spacing: tokens from one row to the next: more than 1 makes ``token`` approximate.
    """

    token: int | None
    spacing: int = 1


@dataclass(frozen=True)
class GroupComparison:
    """What a group of runs over the same tokens shows.

    Attributes:
        tokens: how many all runs share.
        spacing: tokens from one row that they share to the next.
        baseline: the run that the others are compared to.
        compared: each run over these.
        measured: measures other than perplexity over these.
        onsets: by run, each against all that have read as far; a run that cannot be judged is not in it.
        not_judged: why some are not in ``onsets``; empty where all are.
    """

    tokens: int
    spacing: int
    baseline: Baseline
    compared: list[Comparison]
    measured: list[MeasureStatistics]
    onsets: dict[str, Onset]
    not_judged: str = ""


def compare_group(runs: Sequence[Run]) -> GroupComparison | None:
    """Compare runs over the same tokens; ``None`` where fewer than two share the 256 rows that it takes."""
    frames = {run.name: frame for run in runs if len(frame := _sound(run.frame)) >= SMOOTH}
    frames = dict(sorted(frames.items(), key=lambda item: _length(item[1]), reverse=True))
    if len(frames) < 2 or len(shared_lengths(frames.values())) < SMOOTH:
        return None
    baseline = choose_baseline([run for run in runs if run.name in frames])
    compared = {comparison.name: comparison for comparison in compare_runs(frames, baseline.name)}
    onsets, not_judged = _onsets(frames)
    ordered = [compared[run.name] for run in runs if run.name in compared]
    measured = statistics_of(frames)
    return GroupComparison(ordered[0].tokens, ordered[0].spacing, baseline, ordered, measured, onsets, not_judged)


def _sound(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each place, in order; without tokens, which have been checked."""
    _, rows = np.unique(places_of(frame), return_index=True)
    return frame.iloc[rows].drop(columns="token")


def _length(frame: pd.DataFrame) -> int:
    return predictions_in(frame)


def _onsets(frames: dict[str, pd.DataFrame]) -> tuple[dict[str, Onset], str]:
    """Where each run fails, against all that have read at least as far as it, or as one that is shorter.

    The shortest run decides how many tokens all share, and would hide what happens to the others behind its end.
    """
    onsets: dict[str, Onset] = {}
    not_judged = ""
    for length in sorted({_length(frame) for frame in frames.values()}):
        peers = {name: frame for name, frame in frames.items() if _length(frame) >= length}
        if len(peers) < 2 or len(shared_lengths(peers.values())) < SMOOTH:
            continue
        for run in compare_runs(peers, None):
            if run.spacing > SPARSE:
                not_judged = f"the runs share one row in {run.spacing}, too few to tell"
                break
            known = onsets.get(run.name)
            if known is None or (known.token is None and run.breaks is not None):
                onsets[run.name] = Onset(run.breaks, run.spacing)
    return onsets, not_judged
