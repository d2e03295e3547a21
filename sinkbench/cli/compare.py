"""``sinkbench compare``: what a strategy loses, over the same tokens."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from sinkbench.errors import UserError
from sinkbench.results.comparison import SPARSE, Comparison, Interval, about, compare
from sinkbench.results.reading import read_csv, read_results


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="CSV files of runs, or folders of them.")],
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help="The run that the others are compared to, as the table calls it.")
    ] = "transformers",
) -> None:
    """Compare runs over the same tokens: perplexity, loss to dense attention or another run, where they part.

    Intervals are 95 %, by a block bootstrap; |Δ| is the mean absolute
    difference of NLLs. A run parts from the baseline where its NLL over 256
    tokens is 0.05 nats above; it fails where it is 0.5 nats above the best.
    """
    frames = _named(runs)
    if len(frames) < 2:
        raise UserError("at least two runs are needed to compare: give CSV files, or a folder that holds several")
    if baseline not in frames and baseline != "transformers":
        raise UserError(f"no run is called {baseline}: --baseline can be {', '.join(frames)}")
    Console().print(summary(compare(frames, baseline), baseline))


def _named(runs: list[Path]) -> dict[str, pd.DataFrame]:
    """Runs by their files' names, or their folders', or both, or their paths: the first that tells all apart."""
    found: list[tuple[Path, pd.DataFrame]] = []
    for path in dict.fromkeys(runs):
        held = read_results(path) if path.is_dir() else {path.stem: read_csv(path)}
        folder = path if path.is_dir() else path.parent
        found += [(folder / name, frame) for name, frame in held.items()]
    paths = [path for path, _ in found]
    candidates = [
        [path.name for path in paths],
        [path.parent.name for path in paths],
        [f"{path.parent.name}/{path.name}" for path in paths],
        [str(path) for path in paths],
    ]
    names = next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])
    return {name: frame for name, (_, frame) in zip(names, found, strict=True)}


def summary(compared: list[Comparison], baseline: str) -> Table:
    """One line a run."""
    spacing = compared[0].spacing
    by_rows = f", by one row in {spacing}" if spacing > 1 else ""
    table = Table(title=f"over the first {compared[0].tokens:,} tokens{by_rows}")
    table.add_column("run", overflow="fold", no_wrap=max(len(run.name) for run in compared) <= 20)
    for column in ("perplexity", f"ΔNLL to {baseline}", "parts at"):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("what happened")
    for run in compared:
        loss = "-" if run.loss is None else f"{_shown(run.loss, '+.3f')}\n|Δ| {run.mean_difference:.4f}"
        parts = "-" if run.diverges is None else about(run.diverges, run.spacing)
        table.add_row(run.name, _shown(run.perplexity, ".2f"), loss, parts, _told(run))
    return table


def _shown(interval: Interval, style: str) -> str:
    return f"{interval.value:{style}}\n[{interval.low:{style}}, {interval.high:{style}}]".replace("[", r"\[")


def _told(run: Comparison) -> str:
    if run.spacing > SPARSE:
        return "too few rows to tell"
    if run.breaks is not None:
        return f"fails from token {about(run.breaks, run.spacing)} on"
    if run.diverges is not None:
        return "holds, at a small loss"
    return "holds"
