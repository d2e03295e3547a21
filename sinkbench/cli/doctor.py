"""``sinkbench doctor``: what is here, what would run, and how to mend what is missing."""

import warnings
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from sinkbench.diagnostics.doctor import Diagnosis


def doctor() -> None:
    """Say what is installed, what would run here, and how to mend the rest.

    Exit status 0 when the two default commands would work, 1 otherwise.
    """
    warnings.filterwarnings("ignore")
    from rich.console import Console

    from sinkbench.diagnostics.doctor import diagnose

    diagnosis = diagnose()
    Console().print(checks_table(diagnosis))
    for mend in diagnosis.mends:
        typer.echo(f"to mend: {mend}")
    typer.echo("the two default commands would work" if diagnosis.ready else "the two default commands would not work")
    if not diagnosis.ready:
        raise typer.Exit(1)


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
