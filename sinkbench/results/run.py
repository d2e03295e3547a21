"""One run as its files tell of it: its rows and its record."""

import math
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
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
        path: where its rows are; ``None`` where that is not known.
    """

    name: str
    strategy: str
    frame: "pd.DataFrame"
    record: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

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
    def perplexity(self) -> float:
        """``exp`` of the mean NLL of all tokens read; NaN where there is no row."""
        recorded = self.number("overall_ppl")  # which counts all tokens, also where not every row was written
        if recorded is not None:
            return recorded
        return float(self.frame["overall_ppl"].iloc[-1]) if len(self.frame) else math.nan

    @property
    def exit_reason(self) -> str:
        """How it ended, as its record says; ``unknown`` where it has none."""
        return str(self.recorded("exit_reason") or "unknown")

    @property
    def facts(self) -> dict[str, str]:
        """What there is to say of it at a glance, by what that is."""
        latency, cache = self.number("median_latency"), self.number("peak_kv_cache_bytes")
        said = {
            "strategy": self.strategy,
            "model": self.recorded("model", "name"),
            "dataset": self.recorded("dataset", "name"),
            "tokens": f"{self.length:,}",
            "perplexity": f"{self.perplexity:.4f}" if len(self.frame) else "-",
            "median latency": None if latency is None else f"{latency * 1e3:.2f} ms a token",
            "KV cache": None if cache is None else f"{cache / 2**20:.1f} MiB at most",
            "outcome": self.exit_reason,
            "rows": self.path,
        }
        return {name: str(value) for name, value in said.items() if value is not None}

    def __repr__(self) -> str:
        facts = self.facts
        where = f", {facts['rows']}" if "rows" in facts else ""
        said = f"{facts['tokens']} tokens, perplexity {facts['perplexity']}, {facts['outcome']}{where}"
        return f"<run {self.name}: {said}>"

    def _repr_html_(self) -> str:
        cells = ((escape(name), escape(value)) for name, value in self.facts.items())
        rows = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in cells)
        return f"<table><caption>{escape(self.name)}</caption>{rows}</table>"

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
