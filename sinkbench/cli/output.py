"""What a command prints: for people by default, or as a document that programs read."""

import csv
import io
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.results.document import Document
from sinkbench.results.files import encodable, json_text

if TYPE_CHECKING:
    from sinkbench.results.table import Cell, Table


__all__ = ["Document", "Format", "FormatOption", "print_table", "show"]


class Format(StrEnum):
    """How a command prints what it found."""

    text = "text"
    json = "json"
    csv = "csv"
    markdown = "markdown"


FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="text, for people; or json, csv or markdown: standard output then holds nothing else, and in json and "
        "csv numbers are not rounded.",
    ),
]


def show(document: Document, form: Format, people: Callable[[], None]) -> None:
    """Print a document in ``form``; for people, ``people`` does it. Notes then go to standard error.

    For people, notes are printed by ``people``, which may put them where they belong.
    """
    if form is Format.text:
        people()
        return
    text = {Format.json: _json, Format.csv: _csv, Format.markdown: _markdown}[form](document)
    typer.echo(encodable(text), nl=False)
    for note in document.notes:
        typer.echo(note, err=True)


def _json(document: Document) -> str:
    tables = {table.name: table.records() for table in document.tables}
    return json_text({**document.facts, **tables, "notes": list(document.notes)}, indent=2)


def _csv(document: Document) -> str:
    names, rows = document.joined()
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([[_plain(row.get(name)) for name in names] for row in rows])
    return file.getvalue()


def _plain(value: "Cell") -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        from sinkbench.results.table import settings_text

        return settings_text(value) if value else ""
    return repr(value) if isinstance(value, float) else value


def _markdown(document: Document) -> str:
    from sinkbench.results.report.markup import escaped, table_lines
    from sinkbench.results.report.tables import report_table

    lines: list[str] = []
    for table in document.tables:
        lines += [f"### {escaped(table.title)}", ""] if table.title else []
        lines += table_lines(report_table(table))
    return "\n".join(lines[:-1]) + "\n"


def print_table(table: "Table", inline: bool = False) -> None:
    """Print a table for people, as wide as the terminal (:func:`sinkbench.cli.layout.lines_of`)."""
    from sinkbench.cli.layout import lines_of, width_of_terminal

    for line in lines_of(table, width_of_terminal(), inline):
        typer.echo(encodable(line))
