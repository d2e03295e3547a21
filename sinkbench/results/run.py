"""One run as its files tell of it: its rows and its record."""

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sinkbench.results.rows import predictions_in, starts_of

if TYPE_CHECKING:
    import pandas as pd

GENERATE = "generate_"  # how the files of sinkbench generate begin
DENSE = "transformers"  # the strategy that keeps everything
# These come first, in this order. Any other strategy is as good, and follows by its name.
FIRST = (DENSE, "windowed", "attention_sinks", "recompute")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: unique among those that are shown together.
        strategy: what it kept.
        frame: its rows, with all known columns, NaN where the file has none; no row where the run failed before its
            first.
        record: its JSON, empty where there is none.
    """

    name: str
    strategy: str
    frame: "pd.DataFrame"
    record: dict[str, Any] = field(default_factory=dict)

    def recorded(self, *keys: str) -> Any:
        """What the record says under ``keys``; ``None`` where it says nothing."""
        value: Any = self.record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The number that the record says under ``keys``; ``None`` where there is no finite number."""
        value = self.recorded(*keys)
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else None

    @property
    def length(self) -> int:
        """Tokens read, by its last row; of documents, by the last row of each."""
        return predictions_in(self.frame) if len(self.frame) else 0

    @property
    def spacing(self) -> int:
        """Tokens from one row to the next; more than 1 where rows were left out to keep the file small."""
        steps = self.frame["input_length"].diff().drop(self.frame.index[starts_of(self.frame)])
        # a single row may be the first of a thinned file
        return max(1, int(steps.mode().iloc[0]) if len(steps) else self.length)


def strategy_of(stem: str, record: dict[str, Any] | None = None) -> str:
    """The strategy of a run by its record; where that does not say it, by the name of its file without the suffix.

    A file of one of several settings is called by its strategy and these, as ``h2o-recent_512``.
    """
    recorded = record.get("experiment") if record else None
    return recorded if isinstance(recorded, str) else re.split(r"[-.]", stem.removeprefix(GENERATE))[0]


def place_of(name: str, strategy: str) -> tuple[int, str, list[tuple[int, str]]]:
    """Sorts runs by strategy; those of one by their names, in which numbers count by their size."""
    first = FIRST.index(strategy) if strategy in FIRST else len(FIRST)
    parts = re.split(r"(\d+)", name)
    return first, strategy, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
