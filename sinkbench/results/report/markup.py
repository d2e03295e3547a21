"""Markdown in GitHub's flavour, in which all that comes from files is text."""

import re

from sinkbench.results.report.tables import ReportTable, TableCell

SPECIAL = re.compile(r"[\\`*{}\[\]<>#|!~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def escaped(text: str) -> str:
    """``text`` on one line, so that Markdown shows it as it is anywhere but at the beginning of a line."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def fenced(text: str) -> list[str]:
    """``text`` as a block of code that it cannot end, and an empty line."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *text.splitlines(), fence, ""]


def table_lines(table: ReportTable) -> list[str]:
    """A table as Markdown, and an empty line after it and each of its notes."""
    lines = [
        row_line([escaped(column.heading) for column in table.columns]),
        row_line(["---:" if column.number else "---" for column in table.columns]),
        *(row_line([_cell(cell) for cell in row]) for row in table.rows),
        "",
    ]
    for note in table.notes:
        lines += [escaped(note), ""]
    return lines


def row_line(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def _cell(cell: TableCell) -> str:
    detail = cell.detail if cell.detail.startswith("[") else f"({cell.detail})"
    return escaped(f"{cell.text} {detail}" if cell.detail else cell.text)
