"""``sinkbench compare``: what a strategy loses, over the same tokens."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sinkbench.compare import Comparison, Interval, compare
from sinkbench.errors import UserError
from sinkbench.results import read_csv, read_results


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="CSV files of runs, or folders of them.")],
) -> None:
    """Compare runs over the same tokens: perplexity, loss to dense attention, where they part.

    Intervals are 95 %, by a block bootstrap. A run parts from dense attention where its NLL over 256 tokens is 0.05
    nats above; it breaks where it is 0.5 nats above the best of the runs.
    """
    frames = {}
    for path in runs:
        found = read_results(path) if path.is_dir() else {path.stem: read_csv(path)}
        for name, frame in found.items():
            frames[name if name not in frames else str(path)] = frame
    if len(frames) < 2:
        raise UserError("at least two runs are needed to compare: give CSV files, or a folder that holds several")
    Console().print(summary(compare(frames)))


def summary(compared: list[Comparison]) -> Table:
    """One line a run."""
    table = Table(title=f"over the first {compared[0].tokens:,} tokens")
    for column in ("run", "perplexity", "ΔNLL to transformers", "parts at", "what happened"):
        table.add_column(
            column, justify="left" if column in ("run", "what happened") else "right", no_wrap=column == "run"
        )
    for run in compared:
        loss = "-" if run.loss is None else _shown(run.loss, "+.3f")
        parts = "-" if run.diverges is None else f"{run.diverges:,}"
        table.add_row(run.name, _shown(run.perplexity, ".2f"), loss, parts, _told(run))
    return table


def _shown(interval: Interval, style: str) -> str:
    return f"{interval.value:{style}}\n[{interval.low:{style}}, {interval.high:{style}}]".replace("[", r"\[")


def _told(run: Comparison) -> str:
    if run.breaks is not None:
        return f"fails from token {run.breaks:,} on"
    if run.diverges is not None:
        return "holds, at a small loss"
    return "holds"
