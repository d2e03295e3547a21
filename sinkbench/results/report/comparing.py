"""Runs of one folder over the tokens that they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sinkbench.results.comparison import SMOOTH, SPARSE, Comparison, compare, shared_lengths
from sinkbench.results.report.collect import Run


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
    if len(frames) < 2 or len(shared_lengths(frames.values())) < SMOOTH:
        return None
    baseline = next((run.name for run in runs if run.strategy == "transformers"), "transformers")
    compared = {comparison.name: comparison for comparison in compare(frames, baseline)}
    onsets, untold = _onsets(frames, baseline)
    ordered = [compared[run.name] for run in runs if run.name in compared]
    return Shared(ordered[0].tokens, ordered[0].spacing, ordered, onsets, untold)


def _sound(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows with an NLL, one for each length, in order; without tokens, which have been checked."""
    kept = frame[np.isfinite(frame["nll"])].drop_duplicates("input_length")
    return kept.sort_values("input_length").drop(columns="token")


def _length(frame: pd.DataFrame) -> int:
    return int(frame["input_length"].iloc[-1])


def _onsets(frames: dict[str, pd.DataFrame], baseline: str) -> tuple[dict[str, Onset], str]:
    """Where each run fails, against all that have read at least as far as it, or as one that is shorter.

    The shortest run decides how many tokens all share, and would hide what happens to the others behind its end.
    """
    onsets: dict[str, Onset] = {}
    untold = ""
    for length in sorted({_length(frame) for frame in frames.values()}):
        peers = {name: frame for name, frame in frames.items() if _length(frame) >= length}
        if len(peers) < 2 or len(shared_lengths(peers.values())) < SMOOTH:
            continue
        for run in compare(peers, baseline):
            if run.spacing > SPARSE:
                untold = f"the runs share one row in {run.spacing}, too few to tell"
                break
            known = onsets.get(run.name)
            if known is None or (known.token is None and run.breaks is not None):
                onsets[run.name] = Onset(run.breaks, run.spacing)
    return onsets, untold
