"""Tables of values: what commands and reports show, once; each shows it in its own way."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sinkbench.results.intervals import Interval

Cell: TypeAlias = str | int | float | bool | Interval | dict[str, Any] | None
NOTHING = "-"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        name: for programs; an interval is three values, ``name``, ``name_low`` and ``name_high``.
        heading: for people; empty for what only programs get.
        style: how a number is formatted for people; after ``≈`` where it is approximate.
        factor: from the value to the number that people see.
        interval: whether its values are intervals.
    """

    name: str
    heading: str = ""
    style: str = ""
    factor: float = 1.0
    interval: bool = False

    @property
    def is_number(self) -> bool:
        """Whether people see numbers, to the right."""
        return bool(self.style)


@dataclass(frozen=True)
class Table:
    """Rows under columns.

    Attributes:
        name: for programs.
        title: for people; may be empty.
        columns: of every row.
        rows: values by column, unrounded.
        notes: what there is to say about them.
    """

    name: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)

    def records(self) -> list[dict[str, Cell]]:
        """Each row as a program takes it, all its values plain."""
        return [dict(self._values(row)) for row in self.rows]

    def names(self) -> list[str]:
        """The names of all values of a record."""
        return [name for column in self.columns for name in _names(column)]

    def _values(self, row: list[Cell]) -> Iterator[tuple[str, Cell]]:
        for column, cell in zip(self.columns, row, strict=True):
            parts = (cell.value, cell.low, cell.high) if isinstance(cell, Interval) else (cell, None, None)
            yield from zip(_names(column), parts, strict=False)  # of what is no interval, the first

    def shown(self) -> tuple[list[Column], list[list[tuple[str, str]]]]:
        """The columns that people see and their cells: text, and an interval's bounds or nothing.

        A column in which no row has anything is left out.
        """
        texts = [[text_of(cell, column) for cell, column in zip(row, self.columns, strict=True)] for row in self.rows]
        kept = [
            place
            for place, column in enumerate(self.columns)
            if column.heading and any(row[place][0] not in ("", NOTHING) for row in texts)
        ]
        return [self.columns[place] for place in kept], [[row[place] for place in kept] for row in texts]


def _names(column: Column) -> list[str]:
    return [column.name, f"{column.name}_low", f"{column.name}_high"] if column.interval else [column.name]


def text_of(cell: Cell, column: Column) -> tuple[str, str]:
    """A value for people, and the bounds of its interval; either may be empty."""
    if cell is None:
        return NOTHING, ""
    if isinstance(cell, Interval):
        value, low, high = (_number(x, column) for x in (cell.value, cell.low, cell.high))
        return value, "" if math.isnan(cell.value) else f"[{low}, {high}]"
    if isinstance(cell, bool):
        return "yes" if cell else "no", ""
    if isinstance(cell, int | float) and column.style:
        return _number(cell, column), ""
    return (settings_text(cell) if isinstance(cell, dict) else str(cell)), ""


def settings_text(settings: Mapping[str, Any]) -> str:
    """Parameters with their values, as ``--set`` takes them; a dash where there are none."""
    return " ".join(f"{name}={setting_text(value)}" for name, value in settings.items()) or NOTHING


def setting_text(value: object) -> str:
    """One such value; ``None`` is what the strategy chooses by itself."""
    return "auto" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: float, column: Column) -> str:
    about = "≈ " if column.style.startswith("≈") else ""
    return about + format(value * column.factor, column.style.removeprefix("≈"))
