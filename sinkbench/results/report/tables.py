"""Tables of text, the same for the page and for Markdown."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from sinkbench.results.intervals import Interval
from sinkbench.results.looks import Look
from sinkbench.results.table import NOTHING as NO_VALUE
from sinkbench.results.table import Table

NOTHING = "–"


@dataclass(frozen=True)
class TableCell:
    """Text, a second line of less weight, and the colour and the mark of the run whose name it is."""

    text: str
    detail: str = ""
    colour: str = ""
    sign: str = ""


@dataclass(frozen=True)
class TableColumn:
    """A heading; numbers are right-aligned."""

    heading: str
    number: bool = True


@dataclass(frozen=True)
class ReportTable:
    """Rows of cells under headings, with what there is to say about them."""

    columns: list[TableColumn]
    rows: list[list[TableCell]]
    notes: list[str]


def without_empty_columns(table: ReportTable) -> ReportTable:
    """``table`` without the columns in which no row has anything."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text not in ("", NOTHING) for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return ReportTable([table.columns[i] for i in kept], rows, table.notes)


def number(value: float | None, style: str, factor: float = 1.0) -> TableCell:
    """``value`` times ``factor``, or a dash."""
    return TableCell(NOTHING if value is None else format(value * factor, style))


def ranged(found: Interval | None, style: str) -> TableCell:
    """A value over its interval, or a dash."""
    if found is None:
        return TableCell(NOTHING)
    if math.isnan(found.value):
        return TableCell("not a number")
    return TableCell(format(found.value, style), f"[{found.low:{style}}, {found.high:{style}}]")


def report_table(table: Table, looks: Mapping[str, Look] | None = None) -> ReportTable:
    """A table of values as text; names in the first column that are those of runs get their looks."""
    columns, rows = table.shown()
    shown = [[TableCell(NOTHING if text == NO_VALUE else text, detail) for text, detail in row] for row in rows]
    for row in shown:
        look = (looks or {}).get(row[0].text)
        row[0] = TableCell(row[0].text, colour=look.colour, sign=look.sign) if look else row[0]
    return ReportTable([TableColumn(column.heading, column.is_number) for column in columns], shown, table.notes)
