"""The report as Markdown: the page without its figures."""

from sinkbench.results.report.markup import escaped, fenced, row_line, table_lines
from sinkbench.results.report.sections import Report, Section


def markdown(report: Report) -> str:
    """``report`` as Markdown in GitHub's flavour, in which all that comes from files is text."""
    lines = [f"# {escaped(report.title)}", "", f"{escaped(report.made)}.", ""]
    for section in report.sections:
        if len(report.sections) > 1:
            lines += [f"## {escaped(section.title)}", ""]
        lines += _section(section)
    return "\n".join(lines)


def _section(section: Section) -> list[str]:
    lines: list[str] = []
    if section.warnings:
        lines += ["### Warnings", ""]
        for warning in section.warnings:
            whose = f" ({escaped(warning.whose)})" if warning.whose else ""
            lines.append(f"- **{escaped(warning.kind)}**{whose}: {escaped(warning.message)}")
        lines.append("")
    lines += ["### Results", "", *table_lines(section.results)]
    if section.shared:
        lines += ["### Over the same tokens", "", *table_lines(section.shared)]
    for title, table in section.measured:
        lines += [f"### {escaped(title)}", "", *table_lines(table)]
    for written in section.texts:
        lines += [f"### Text that {escaped(written.name)} wrote", "", *fenced(written.text)]
    lines += ["### Settings and versions", ""]
    if section.different:
        lines += ["Different between the runs:", "", *table_lines(section.different)]
    if section.recorded:
        lines += ["| Setting | In all runs |", "| --- | --- |"]
        lines += [row_line([escaped(setting.name), escaped(setting.text)]) for setting in section.same]
    else:
        lines.append("No JSON lies beside these files, so settings and versions are not known.")
    lines.append("")
    if section.commands:
        lines += ["### To repeat", "", *fenced("\n".join(section.commands))]
    return lines
