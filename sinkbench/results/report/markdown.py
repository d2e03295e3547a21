"""The report as Markdown: the page without its figures."""

import re

from sinkbench.results.report.sections import Report, Section
from sinkbench.results.report.tables import ReportTable, TableCell

SPECIAL = re.compile(r"[\\`*{}\[\]<>#|!~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)


def markdown(report: Report) -> str:
    """``report`` as Markdown in GitHub's flavour, in which all that comes from files is text."""
    lines = [f"# {escaped(report.title)}", "", f"{escaped(report.made)}.", ""]
    for section in report.sections:
        if len(report.sections) > 1:
            lines += [f"## {escaped(section.title)}", ""]
        lines += _section(section)
    return "\n".join(lines)


def escaped(text: str) -> str:
    """``text`` on one line, so that Markdown shows it as it is anywhere but at the beginning of a line."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def fenced(text: str) -> list[str]:
    """``text`` as a block of code that it cannot end, and an empty line."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *text.splitlines(), fence, ""]


def _section(section: Section) -> list[str]:
    lines: list[str] = []
    if section.warnings:
        lines += ["### Warnings", ""]
        for warning in section.warnings:
            whose = f" ({escaped(warning.runs[0])})" if len(warning.runs) == 1 else ""
            lines.append(f"- **{escaped(warning.kind)}**{whose}: {escaped(warning.message)}")
        lines.append("")
    lines += ["### Results", "", *_table(section.results)]
    if section.shared:
        lines += ["### Over the same tokens", "", *_table(section.shared)]
    for title, table in section.measured:
        lines += [f"### {escaped(title)}", "", *_table(table)]
    for written in section.texts:
        lines += [f"### Text that {escaped(written.name)} wrote", "", *fenced(written.text)]
    lines += ["### Settings and versions", ""]
    if section.different:
        lines += ["Different between the runs:", "", *_table(section.different)]
    if section.recorded:
        lines += ["| Setting | In all runs |", "| --- | --- |"]
        lines += [_row([escaped(setting.name), escaped(setting.text)]) for setting in section.same]
    else:
        lines.append("No JSON lies beside these files, so settings and versions are not known.")
    lines.append("")
    if section.commands:
        lines += ["### To repeat", "", *fenced("\n".join(section.commands))]
    return lines


def _table(table: ReportTable) -> list[str]:
    """A table, and an empty line after it and each of its notes."""
    lines = [
        _row([escaped(column.heading) for column in table.columns]),
        _row(["---:" if column.number else "---" for column in table.columns]),
        *(_row([_cell(cell) for cell in row]) for row in table.rows),
        "",
    ]
    for note in table.notes:
        lines += [escaped(note), ""]
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: TableCell) -> str:
    detail = cell.detail if cell.detail.startswith("[") else f"({cell.detail})"
    return escaped(f"{cell.text} {detail}" if cell.detail else cell.text)
