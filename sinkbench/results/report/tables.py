"""Tables of text, the same for the page and for Markdown."""

from dataclasses import dataclass

from sinkbench.results.comparison import Interval

NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """Text, a second line of less weight, and whose colour stands before it."""

    text: str
    detail: str = ""
    colour: str = ""


@dataclass(frozen=True)
class Column:
    """A heading; numbers are right-aligned."""

    heading: str
    number: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings, with what there is to say about them."""

    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str]


def without_empty_columns(table: Table) -> Table:
    """``table`` without the columns in which no row has anything."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text not in ("", NOTHING) for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return Table([table.columns[i] for i in kept], rows, table.notes)


def number(value: float | None, style: str, factor: float = 1.0) -> Cell:
    """``value`` times ``factor``, or a dash."""
    return Cell(NOTHING if value is None else format(value * factor, style))


def ranged(found: Interval | None, style: str) -> Cell:
    """A value over its interval, or a dash."""
    if found is None:
        return Cell(NOTHING)
    return Cell(format(found.value, style), f"[{found.low:{style}}, {found.high:{style}}]")
