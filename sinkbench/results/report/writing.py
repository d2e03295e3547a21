"""``sinkbench report``: from folders to files."""

from collections.abc import Sequence
from pathlib import Path

from sinkbench.errors import UserError
from sinkbench.files import check_output
from sinkbench.results.files import encodable, replace_file
from sinkbench.results.report.collect import collect

SUFFIXES = (".html", ".md")


def write_report(folders: Sequence[Path], output: Path | None = None) -> list[Path]:
    """Write a report on all results in ``folders``: a page with Markdown beside it, or Markdown alone.

    Args:
        folders: as ``sinkbench run`` or ``sinkbench sweep`` wrote them; those below count too.
        output: a ``.html`` or ``.md`` file; by default ``report.html`` in the first folder.

    Returns:
        The files written.

    Raises:
        UserError: another suffix, a folder without results, or a file that cannot be written.
    """
    output = output or folders[0] / "report.html"
    suffix = output.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"cannot tell the format of {output}: --output must end in .html or .md")
    for path in {output, output.with_suffix(".md")}:
        check_output(path)
    groups = collect(folders)
    from sinkbench.results.report.markdown import markdown
    from sinkbench.results.report.page import html
    from sinkbench.results.report.sections import report

    found = report(", ".join(map(str, folders)), groups)
    texts = {output.with_suffix(".md") if suffix == ".html" else output: markdown(found)}
    if suffix == ".html":
        texts[output] = html(found)
    for path, text in texts.items():
        replace_file(path, encodable(text).encode(), folder=True, advice="; give another --output")
    return sorted(texts)
