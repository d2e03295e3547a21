"""Results of several documents: where a row is, and what documents come to at each input length."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

ROOM = 2**30  # more input lengths than a stream has; a place is a whole number that float64 holds


def streams_of(frame: "pd.DataFrame") -> np.ndarray | None:
    """The document of each row; ``None`` where all are of one stream."""
    if "stream" not in frame or not frame["stream"].notna().any():
        return None
    return frame["stream"].to_numpy()


def places_of(frame: "pd.DataFrame") -> np.ndarray:
    """Where each row is, as one number that rises from row to row: its input length, behind earlier documents."""
    streams, lengths = streams_of(frame), frame["input_length"].to_numpy()
    return lengths if streams is None else np.nan_to_num(streams) * ROOM + lengths


def named_place(place: float) -> str:
    """A place of :func:`places_of`, in words."""
    stream, length = divmod(int(place), ROOM)
    return f"{length:,}" + (f" of document {stream:,}" if stream else "")


def mean_by_length(lengths: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ``lengths``, in order, and the mean of the ``values`` at each."""
    found, which, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    with np.errstate(invalid="ignore"):
        return found, np.bincount(which, values) / counts


def by_length(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each input length: means over the documents that go so far; of one stream, ``frame`` as it is.

    ``overall_ppl`` is that of all tokens up to this length, of all documents. What is no mean, as ``token``, is NaN.
    """
    if streams_of(frame) is None:
        return frame
    groups = frame.drop(columns=["stream", "token"], errors="ignore").groupby("input_length", sort=True)
    means, nll = groups.mean(), groups["nll"].sum(min_count=1)
    with np.errstate(over="ignore"):
        means["ppl"] = np.exp(means["nll"])
        means["overall_ppl"] = np.exp(nll.cumsum() / groups.size().cumsum())
    return means.reset_index().reindex(columns=frame.columns)
