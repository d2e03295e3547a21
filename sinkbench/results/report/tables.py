"""Tables of text, the same for the page and for Markdown."""

import math
from dataclasses import dataclass

from sinkbench.results.intervals import Interval

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
