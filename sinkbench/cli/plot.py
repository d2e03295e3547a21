"""``sinkbench plot``: the figure of all runs in a folder."""

import warnings
from pathlib import Path
from typing import Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.library.plotting import FEATURES, LOG_PERPLEXITY_LIMIT, SKIP_FIRST
from sinkbench.results.columns import features_of
from sinkbench.validation import MOST


def plot(
    output_dir: Annotated[
        Path, typer.Option(parser=place, metavar="DIR", help="Folder of the CSVs that sinkbench run wrote.")
    ] = Path("results"),
    features: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(features_of('run'))}; of generated text {', '.join(features_of('generate'))} too: the "
            "first on the left axis, each further one on its own right axis. Figures of their own: retention, which "
            "tokens are held, of runs with --trace; recall, the loss by how many tokens back a pair was last seen; "
            "frontier, the loss against what the cache holds.",
            metavar="NAME...",
        ),
    ] = list(FEATURES),  # noqa: B006 - typer copies it
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="\\n breaks the line.")] = None,
    log_perplexity_limit: Annotated[
        float, typer.Option(metavar="X", help="Highest log perplexity shown; 0 for no limit.")
    ] = LOG_PERPLEXITY_LIMIT,
    skip_first: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, metavar="N", help="Rows of each run not to draw: perplexity is unstable at first."
        ),
    ] = SKIP_FIRST,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of recall and frontier: as of sinkbench compare."),
    ] = None,
    ngram: Annotated[int | None, typer.Option(metavar="N", help="Of recall: as of sinkbench compare.")] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Of recall: as of sinkbench compare.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=place,
            metavar="FILE",
            help="A .png, .svg or .pdf; by default named by the features, in the folder. Beside other features, "
            "a figure of its own goes to FILE_ and its name.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Open a window with the figure too.")] = False,
) -> None:
    """Draw the results in a folder: perplexity, memory and latency over the input length, and what was kept."""
    import numpy as np

    from sinkbench.library.plotting import asked_figures, beside, drawn_of, in_windows
    from sinkbench.results import figures
    from sinkbench.results.reading import read_runs

    warnings.filterwarnings("ignore", "Glyph")  # of a title or a name that the font has not: it shows as a box

    asked = asked_figures(features, baseline, ngram, tokens)
    path = output or output_dir / f"{asked.first}.png"
    figures.check_format(path)
    with np.errstate(all="ignore"):  # what is no number is not drawn
        drawn, notes = drawn_of(read_runs(output_dir), asked, title, log_perplexity_limit, skip_first)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    for name, figure in drawn.items():
        own = beside(path, name) if output else output_dir / f"{name}.png"
        file = path if name == asked.first else own
        figures.save(figure, file)
        typer.echo(f"saved {file}")
    if show:
        in_windows(list(drawn.values()), path)
