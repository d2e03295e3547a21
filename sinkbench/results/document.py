"""What was found, as tables with single values and notes: what commands print, and frames are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkbench.results.table import Cell, Table


@dataclass(frozen=True)
class Document:
    """What was found.

    Attributes:
        tables: by what they are about; as one, those after the first are joined to it by their first column.
        facts: single values.
        notes: lines to read beside the tables.
    """

    tables: "Sequence[Table]"
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def joined(self) -> "tuple[list[str], list[dict[str, Cell]]]":
        """All tables as one: the names of its columns, and its rows."""
        first, *others = self.tables
        names, rows = first.names(), first.records()
        key = first.columns[0].name
        for table in others:
            names += [name for name in table.names() if name not in names]
            known = {str(record[key]): record for record in table.records()}
            rows = [{**row, **known.get(str(row[key]), {})} for row in rows]
        return names, rows
