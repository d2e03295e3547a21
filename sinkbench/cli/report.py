"""``sinkbench report``: one page on results."""

from pathlib import Path
from typing import Annotated

import typer

from sinkbench.cli.options import place


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(parser=place, metavar="DIR...", help="Folders that sinkbench wrote; those below count too."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            metavar="FILE",
            help="A .html (Markdown is written beside it) or .md; by default report.html in the first folder.",
        ),
    ] = None,
) -> None:
    """Make one self-contained page of results: figures, tables, settings, and what looks wrong.

    Each folder that holds runs gets a section of its own. The page needs no network.
    """
    import numpy as np

    from sinkbench.results.report.writing import write_report

    with np.errstate(all="ignore"):  # what is no number shows as such
        written = write_report(folders, output)
    for path in written:
        typer.echo(f"saved {path}")
