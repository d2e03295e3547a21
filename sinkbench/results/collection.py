"""Several runs, as a notebook shows them."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sinkbench.results.run import Run

if TYPE_CHECKING:
    import pandas as pd


class Runs(Mapping[str, Run]):
    """Runs by their names."""

    def __init__(self, runs: Mapping[str, Run]) -> None:
        self._runs = dict(runs)

    def __getitem__(self, name: str) -> Run:
        return self._runs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def frame(self) -> "pd.DataFrame":
        """All rows, those of a run under its name in the column ``run``; without columns that no run has."""
        import pandas as pd

        parts = [run.frame.assign(run=run.name, strategy=run.strategy) for run in self.values() if len(run.frame)]
        if not parts:
            return pd.DataFrame(columns=["run", "strategy"])
        rows = pd.concat([part.dropna(axis="columns", how="all") for part in parts], ignore_index=True)
        return rows[["run", "strategy", *(name for name in rows.columns if name not in ("run", "strategy"))]]

    @property
    def summary(self) -> "pd.DataFrame":
        """One row a run: its strategy, model and dataset, tokens read, perplexity, costs and how it ended."""
        import pandas as pd

        rows = [
            {
                "run": run.name,
                "strategy": run.strategy,
                "model": run.recorded("model", "name"),
                "dataset": run.recorded("dataset", "name"),
                "tokens": run.length,
                "perplexity": run.perplexity,
                "median_latency": run.number("median_latency"),
                "peak_kv_cache_bytes": run.number("peak_kv_cache_bytes"),
                "exit_reason": run.exit_reason,
            }
            for run in self.values()
        ]
        return pd.DataFrame(rows).set_index("run") if rows else pd.DataFrame()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values())) or "<no runs>"

    def _repr_html_(self) -> str:
        return str(self.summary.to_html())
