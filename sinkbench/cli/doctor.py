"""``sinkbench doctor``: what is here, what would run, and how to mend what is missing."""

import warnings
from typing import TYPE_CHECKING

import typer

from sinkbench.cli.output import Document, Format, FormatOption, show

if TYPE_CHECKING:
    from rich.table import Table

    from sinkbench.diagnostics.doctor import Diagnosis
    from sinkbench.results.table import Table as ValueTable


def doctor(form: FormatOption = Format.text) -> None:
    """Say what is installed, what would run here, and how to mend the rest.

    Exit status 0 when the two default commands would work, 1 otherwise.
    """
    warnings.filterwarnings("ignore")
    from sinkbench.diagnostics.doctor import diagnose

    diagnosis = diagnose()
    mends = [f"to mend: {mend}" for mend in diagnosis.mends]
    outcome = f"the two default commands would {'' if diagnosis.ready else 'not '}work"
    document = Document([values(diagnosis)], {"ready": diagnosis.ready}, [*mends, outcome])

    def people() -> None:
        from rich.console import Console

        Console().print(checks_table(diagnosis))
        for line in document.notes:
            typer.echo(line)

    show(document, form, people)
    if not diagnosis.ready:
        raise typer.Exit(1)


def values(diagnosis: "Diagnosis") -> "ValueTable":
    """All checks, one a row, for programs."""
    from sinkbench.results.table import Column, Table

    columns = [
        Column("what", "what"),
        Column("state", "state"),
        Column("found", "found"),
        Column("mend", "to mend"),
        Column("section", "section"),
    ]
    rows = [
        [check.what, check.state, check.found, check.mend, title]
        for title, checks in diagnosis.sections.items()
        for check in checks
    ]
    return Table("checks", "", columns, [list(row) for row in rows])


def checks_table(diagnosis: "Diagnosis") -> "Table":
    """All checks, one a row; plain enough for a pipe."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "note": "yellow", "missing": "red"}
    shown = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column(max_width=24)
    shown.add_column(overflow="fold")
    for title, checks in diagnosis.sections.items():
        shown.add_row("", Text(title, style="bold"), "")
        for check in checks:
            shown.add_row(Text(check.state, style=colours[check.state]), Text(check.what), Text(check.found))
    return shown
