"""``sinkbench compare``: what a strategy loses, over the same tokens."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from sinkbench.results.comparison import Comparison
    from sinkbench.results.intervals import Interval
    from sinkbench.results.run import Run
    from sinkbench.results.statistics import MeasureStatistics


def compare(
    runs: Annotated[
        list[Path], typer.Argument(parser=place, metavar="RUN...", help="CSV files of runs, or folders of them.")
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The run that the others are compared to, as the table calls it; by default the one of dense "
            "attention.",
        ),
    ] = None,
) -> None:
    """Compare runs over the same tokens: perplexity, loss to dense attention or another run, where they part.

    Intervals are 95 %, by a block bootstrap; |Δ| is the mean absolute
    difference of NLLs. A run parts from the baseline where its NLL over 256
    tokens is 0.05 nats above; it fails where it is 0.5 nats above the best.
    """
    import numpy as np
    from rich.console import Console

    from sinkbench.results.baseline import choose_baseline, unfit_baseline
    from sinkbench.results.comparison import compare_runs
    from sinkbench.results.divergence import beyond_training
    from sinkbench.results.statistics import statistics_of

    found = _read(runs)
    if len(found) < 2:
        raise UserError("at least two runs are needed to compare: give CSV files, or a folder that holds several")
    frames = {name: run.frame for name, run in found.items()}
    chosen = choose_baseline(list(found.values()), baseline)
    with np.errstate(all="ignore"):  # what is no number shows as such
        compared, measures = compare_runs(frames, chosen.name), statistics_of(frames)
    console = Console()
    console.print(summary(compared, chosen.name))
    typer.echo(chosen.why)
    unfit = [unfit_baseline(chosen.run, run) for run in compared if chosen.run and run.name == chosen.name]
    unfit += dict.fromkeys(beyond_training(run.record, compared[0].tokens) for run in found.values())
    for warning in filter(None, unfit):
        typer.echo(f"warning: {warning}")
    for measured in measures:
        typer.echo(f"\n{_title(measured)}")
        console.print(measure_summary(measured))


def _read(paths: list[Path]) -> "dict[str, Run]":
    """Runs by their files' names, or their folders', or both, or their paths: the first that is different for all."""
    from dataclasses import replace

    from sinkbench.results.reading import read_run, read_runs

    found: list[tuple[Path, Run]] = []
    for path in dict.fromkeys(paths):
        held = read_runs(path).values() if path.is_dir() else [read_run(path)]
        found += [((path if path.is_dir() else path.parent) / run.name, run) for run in held]
    places = [place for place, _ in found]
    candidates = [
        [place.name for place in places],
        [place.parent.name for place in places],
        [f"{place.parent.name}/{place.name}" for place in places],
        [str(place) for place in places],
    ]
    names = next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])
    return {name: replace(run, name=name) for name, (_, run) in zip(names, found, strict=True)}


def summary(compared: "list[Comparison]", baseline: str | None) -> "Table":
    """One line a run; without a baseline, what each comes to by itself."""
    from rich.markup import escape
    from rich.table import Table

    from sinkbench.results.comparison import onset_text

    spacing = compared[0].spacing
    by_rows = f", by one row in {spacing}" if spacing > 1 else ""
    of = f" of {compared[0].documents:,} documents" if compared[0].documents > 1 else ""
    table = Table(title=f"over the first {compared[0].tokens:,} tokens{of}{by_rows}")
    _add_run_column(table, [run.name for run in compared])
    for column in ("perplexity", *((f"ΔNLL to {escape(baseline)}", "parts at") if baseline else ())):
        table.add_column(column, justify="right", overflow="fold")
    table.add_column("what happened")
    for run in compared:
        cells = [_shown(run.perplexity, ".2f")]
        if baseline:
            cells.append("-" if run.loss is None else f"{_shown(run.loss, '+.3f')}\n|Δ| {run.mean_difference:.4f}")
            cells.append("-" if run.diverges is None else onset_text(run.diverges, run.spacing))
        table.add_row(escape(run.name), *cells, _what_happened(run))
    return table


def measure_summary(measured: "MeasureStatistics") -> "Table":
    """One measure, one line a run."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    _add_run_column(table, list(measured.runs))
    for column in next(iter(measured.runs.values())):
        table.add_column(column, justify="right", overflow="fold")
    for name, statistics in measured.runs.items():
        cells = [f"{found:.4g}" if isinstance(found, float) else _shown(found, ".4g") for found in statistics.values()]
        table.add_row(escape(name), *cells)
    return table


def _title(measured: "MeasureStatistics") -> str:
    unit = f" ({measured.unit})" if measured.unit else ""
    better = f", {measured.measure.better} is better" if measured.measure.better else ""
    return f"{measured.measure.label}{unit}{better}"


def _add_run_column(table: "Table", names: list[str]) -> None:
    table.add_column("run", overflow="fold", no_wrap=max(map(len, names)) <= 20)


def _shown(interval: "Interval", style: str) -> str:
    return f"{interval.value:{style}}\n[{interval.low:{style}}, {interval.high:{style}}]".replace("[", r"\[")


def _what_happened(run: "Comparison") -> str:
    from sinkbench.results.comparison import SPARSE, onset_text

    if run.spacing > SPARSE:
        return "fails; too few rows to tell where" if run.fails else "too few rows to tell"
    if run.breaks is not None:
        return f"fails from token {onset_text(run.breaks, run.spacing)} on"
    if run.diverges is not None:
        return "holds, at a small loss"
    return "holds"
