"""Whole runs compared: perplexities, losses, where runs part and fail, and what else was measured."""

from typing import TYPE_CHECKING

import typer

from sinkbench.cli.output import Document, Format, print_table, show

if TYPE_CHECKING:
    from sinkbench.results.baseline import Baseline
    from sinkbench.results.comparison import Comparison
    from sinkbench.results.run import Run
    from sinkbench.results.statistics import MeasureStatistics
    from sinkbench.results.table import Table


def compare_whole(found: "dict[str, Run]", chosen: "Baseline", form: Format) -> None:
    """Compare ``found`` to the baseline ``chosen``, and print it in ``form``.

    Raises:
        UserError: the runs predicted different tokens, or share no row.
    """
    from sinkbench.results.baseline import unfit_baseline
    from sinkbench.results.comparison import compare_runs
    from sinkbench.results.statistics import statistics_of
    from sinkbench.results.units import units_table

    frames = {name: run.frame for name, run in found.items()}
    compared, measures = compare_runs(frames, chosen.name), statistics_of(frames)
    unfit = [unfit_baseline(chosen.run, run) for run in compared if chosen.run and run.name == chosen.name]
    notes = [chosen.why, *(f"warning: {warning}" for warning in filter(None, unfit))]
    main = comparison_table(compared, chosen.name)
    units = units_table(compared, found)
    further = [*([units] if units else []), *map(measure_table, measures)]
    facts = {"baseline": chosen.name, "tokens": compared[0].tokens, "spacing": compared[0].spacing}

    def people() -> None:
        print_table(main)
        for note in notes:
            typer.echo(note)
        for table in further:
            typer.echo()
            print_table(table)

    show(Document([main, *further], facts, notes), form, people)


def comparison_table(compared: "list[Comparison]", baseline: str | None) -> "Table":
    """One row a run; without a baseline, what each comes to by itself."""
    from sinkbench.results.table import Column, Table

    spacing = compared[0].spacing
    by_rows = f", by one row in {spacing}" if spacing > 1 else ""
    columns = [Column("run", "run"), Column("perplexity", "perplexity", ".2f", interval=True)]
    if baseline:
        columns += [
            Column("loss", f"ΔNLL to {baseline}", "+.3f", interval=True),
            Column("mean_difference", "|Δ|", ".4f"),
            Column("parts_at", "parts at", "≈,.0f" if spacing > 1 else ",.0f"),
        ]
    columns += [Column("fails_at"), Column("fails"), Column("what_happened", "what happened")]
    rows = []
    for run in compared:
        against = [run.loss, run.mean_difference, run.diverges] if baseline else []
        rows.append([run.name, run.perplexity, *against, run.breaks, run.fails, _what_happened(run)])
    return Table("runs", f"over the first {compared[0].tokens:,} tokens{by_rows}", columns, rows)


def measure_table(measured: "MeasureStatistics") -> "Table":
    """One measure, one row a run; for programs in its unit too."""
    from sinkbench.results.intervals import Interval
    from sinkbench.results.table import Column, Table

    unit = f" ({measured.unit})" if measured.unit else ""
    better = f", {measured.measure.better} is better" if measured.measure.better else ""
    first = next(iter(measured.runs.values()))
    columns = [
        Column(_name(measured.measure.column, name), name, ".4g", interval=isinstance(found, Interval))
        for name, found in first.items()
    ]
    rows = [[name, *statistics.values()] for name, statistics in measured.runs.items()]
    title = f"{measured.measure.label}{unit}{better}"
    return Table(measured.measure.column, title, [Column("run", "run"), *columns], rows)


def _name(column: str, statistic: str) -> str:
    """What programs call a statistic of a column."""
    return f"{column}_{statistic}".replace(" %", "").replace(" ", "_").replace(".", "_")


def _what_happened(run: "Comparison") -> str:
    from sinkbench.results.comparison import SPARSE, onset_text

    if run.spacing > SPARSE:
        return "fails; too few rows to tell where" if run.fails else "too few rows to tell"
    if run.breaks is not None:
        return f"fails from token {onset_text(run.breaks, run.spacing)} on"
    if run.diverges is not None:
        return "holds, at a small loss"
    return "holds"
