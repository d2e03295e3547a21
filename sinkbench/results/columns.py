"""Result files, read back, and what their columns show.

Reads our own CSVs and those of the scripts that sinkbench replaces. To show another feature, add an entry to
:data:`FEATURES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pandas as pd

REQUIRED = ("input_length", "nll", "ppl", "overall_ppl", "cuda_vram_allocated", "latency")


OPTIONAL = ("kv_cache_bytes", "token")


GENERATED = ("fresh_nll", "repetition", "non_word")  # what sinkbench generate adds


GENERATE = "generate_"  # how its files begin


Values: TypeAlias = "pd.Series[float]"


ORDER = ("transformers", "windowed", "attention_sinks", "recompute")


def log(values: Values) -> Values:
    """Natural logarithm; of what overflowed to ``inf``, that of the largest float64."""
    return pd.Series(np.log(values.clip(upper=np.finfo(np.float64).max)), index=values.index)


def smoothed(values: Values) -> Values:
    """Rolling median: hiccups of the machine vanish, steps stay where they are.

    At both ends the window is what there is of it, at least its half.
    """
    window = max(25, len(values) // 100)
    return values.rolling(window, center=True, min_periods=1).median()


def averaged(values: Values) -> Values:
    """Mean of the last 256 values; at the beginning, of at least half as many."""
    return values.rolling(256, min_periods=min(128, len(values))).mean()


def mebibytes(values: Values) -> Values:
    """Bytes to MiB."""
    return values / 2**20


def unchanged(values: Values) -> Values:
    """As it is."""
    return values


@dataclass(frozen=True)
class Feature:
    """Something to draw over the input length.

    Attributes:
        column: of the result files.
        label: what it is, without its unit.
        style: matplotlib's line style.
        transform: from the column to what is drawn, in the first of ``units``.
        units: name and factor; the first in which the largest value is at least 1, else the last.
        limited: whether ``--log-perplexity-limit`` bounds the axis.
        missing: what to tell when no run has the column.
        otherwise: drawn instead when no run has the column.
    """

    column: str
    label: str
    style: str
    transform: Callable[[Values], Values] = unchanged
    units: tuple[tuple[str, float], ...] = (("", 1.0),)
    limited: bool = False
    missing: str = "run the experiments again"
    otherwise: "Feature | None" = None


KV_CACHE = Feature("kv_cache_bytes", "KV cache", "--", mebibytes, (("MiB; no CUDA", 1.0),))


GENERATED_MISSING = "they are not of generated text; use sinkbench generate"


PERCENT = (("%", 100.0),)


FEATURES = {
    "perplexity": Feature("overall_ppl", "Log perplexity", "-", log, limited=True),
    "vram": Feature(
        "cuda_vram_allocated",
        "CUDA VRAM",
        "--",
        units=(("GiB", 1.0),),
        missing="they were made without CUDA and hold no kv_cache_bytes either; leave out the feature vram",
        otherwise=KV_CACHE,
    ),
    "latency": Feature(
        "latency",
        "Time per token",
        ":",
        smoothed,
        (("s", 1.0), ("ms", 1000.0)),
        missing="they were made with the parallel engine, which runs no step a token; use --engine stepwise",
    ),
    "fluency": Feature("fresh_nll", "NLL with fresh context", "-", averaged, missing=GENERATED_MISSING),
    "repetition": Feature("repetition", "Repeated 4-grams", "--", units=PERCENT, missing=GENERATED_MISSING),
    "non_word": Feature("non_word", "Non-words", ":", units=PERCENT, missing=GENERATED_MISSING),
}
