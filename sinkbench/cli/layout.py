"""Tables as lines of text that fit a terminal: numbers are never broken, names and sentences are."""

import re
import shutil
import unicodedata
from collections.abc import Sequence

from sinkbench.results.table import Column, Table

GAP = 2  # characters between columns
NARROWEST = 14  # characters that a column of names or sentences is squeezed to before the layout changes
INDENT = "  "
PIECES = re.compile(r"(?:[^ /_\-]|-(?=[\d.]))*(?: %)?[ /_\-]?")  # of a text, behind each of which a line may end


def width_of_terminal() -> int:
    """Characters of a line: those of the terminal, or of ``COLUMNS``; 80 where neither is known."""
    return max(shutil.get_terminal_size().columns, 20)


def lines_of(table: Table, width: int, inline: bool = False) -> list[str]:
    """``table`` in lines of at most ``width`` characters where that can be, its title first.

    Columns stand side by side; where these are too many, the first stands on a line of its own above the others; and
    where those are still too many, each value has its own line.

    Args:
        inline: whether the bounds of an interval stand beside its value, and not below it.
    """
    columns, rows = table.shown()
    cells = [[_cell(cell, inline) for cell in row] for row in rows]
    head = _wrapped(clean(table.title), width) if table.title else []
    if not columns:
        return head
    widths = _widths(columns, cells, width)
    if widths:
        return [*head, *_grid(columns, cells, widths)]
    rest, left = columns[1:], [row[1:] for row in cells]
    widths = _widths(rest, left, width - len(INDENT))
    if widths:
        above = [columns[0].heading, *_indented(_grid(rest, [], widths))]
        below = (line for row, part in zip(cells, left, strict=True) for line in _under(rest, row, part, widths, width))
        return [*head, *above, *below]
    return [*head, *(line for row in cells for line in _listed(columns, row, width))]


def clean(text: str) -> str:
    """``text`` on one line, without what would move a terminal's cursor."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _cell(cell: tuple[str, str], inline: bool) -> list[str]:
    parts = [clean(part) for part in cell if part]
    return [" ".join(parts)] if inline and cell[1] else parts or [""]


def _size(text: str) -> int:
    """Columns of a terminal that ``text`` takes."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[list[str]]], width: int) -> list[int]:
    """How wide each column is; none where they do not fit."""
    wanted, least = [], []
    for place, column in enumerate(columns):
        longest = max((_size(line) for row in cells for line in row[place]), default=0)
        word = max(_size(piece.strip()) for piece in PIECES.findall(column.heading))
        wanted.append(max(longest, _size(column.heading)))
        least.append(max(longest, word) if column.is_number else min(wanted[-1], max(NARROWEST, word)))
        if not place:  # names broken into more lines than two are better read above
            least[0] = max(least[0], -(-wanted[0] * 6 // 10))
    spare = width - GAP * (len(columns) - 1) - sum(least)
    if spare < 0:
        return []
    found = list(least)
    for place in sorted(range(len(columns)), key=lambda place: columns[place].is_number):  # names first
        more = min(spare, wanted[place] - found[place])
        found[place] += more
        spare -= more
    return found


def _grid(columns: Sequence[Column], cells: Sequence[Sequence[list[str]]], widths: Sequence[int]) -> list[str]:
    """Headings, a rule, and the rows."""
    headings = [[column.heading] for column in columns]
    lines = [*_row(columns, headings, widths, bottom=True), _rule(widths)]
    return [*lines, *(line for row in cells for line in _row(columns, row, widths))]


def _rule(widths: Sequence[int]) -> str:
    return (" " * GAP).join("─" * width for width in widths)


def _row(columns: Sequence[Column], row: Sequence[list[str]], widths: Sequence[int], bottom: bool = False) -> list[str]:
    parts = [
        [piece for line in cell for piece in _wrapped(line, width)] for cell, width in zip(row, widths, strict=True)
    ]
    height = max(map(len, parts))
    parts = [[""] * (height - len(part)) + part if bottom else part + [""] * (height - len(part)) for part in parts]
    lines = []
    for pieces in zip(*parts, strict=True):
        padded = [
            " " * (width - _size(piece)) + piece if column.is_number else piece + " " * (width - _size(piece))
            for piece, column, width in zip(pieces, columns, widths, strict=True)
        ]
        lines.append((" " * GAP).join(padded).rstrip())
    return lines


def _under(
    rest: Sequence[Column], row: Sequence[list[str]], part: Sequence[list[str]], widths: Sequence[int], width: int
) -> list[str]:
    """A row with its first cell above the others."""
    return [*_name(row, width), *_indented(_row(rest, part, widths))]


def _indented(lines: Sequence[str]) -> list[str]:
    return [INDENT + line for line in lines]


def _listed(columns: Sequence[Column], row: Sequence[list[str]], width: int) -> list[str]:
    """A row with each value on its own line, below the first."""
    lines = _name(row, width)
    for column, cell in zip(columns[1:], row[1:], strict=True):
        whole, room = f"{column.heading}: {' '.join(cell)}", width - len(INDENT)
        parts = [whole] if _size(whole) <= room or not column.is_number else [f"{column.heading}: {cell[0]}", *cell[1:]]
        lines += _indented([line for part in parts for line in _wrapped(part, room)])
    return lines


def _name(row: Sequence[list[str]], width: int) -> list[str]:
    return [piece for line in row[0] for piece in _wrapped(line, width)]


def _wrapped(text: str, width: int) -> list[str]:
    """``text`` broken behind spaces and the marks in names where it must be."""
    lines, line = [], ""
    for piece in PIECES.findall(text):
        if line and _size((line + piece).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += piece
        while _size(line.rstrip()) > width:
            cut = next(n for n in range(len(line), 0, -1) if _size(line[:n]) <= width or n == 1)
            lines.append(line[:cut])
            line = line[cut:]
    return [*lines, line.rstrip()] if line.rstrip() or not lines else lines
