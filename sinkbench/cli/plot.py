"""``sinkbench plot``: the figure of all runs in a folder."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.errors import UserError
from sinkbench.results.columns import features_of
from sinkbench.validation import MOST

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(
    output_dir: Annotated[
        Path, typer.Option(parser=place, metavar="DIR", help="Folder of the CSVs that sinkbench run wrote.")
    ] = Path("results"),
    features: Annotated[
        list[str],
        typer.Option(
            help=f"{', '.join(features_of('run'))}; of generated text {', '.join(features_of('generate'))} too: the "
            "first on the left axis, each further one on its own right axis.",
            metavar="NAME...",
        ),
    ] = ["perplexity", "vram"],  # noqa: B006 - typer copies it
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="\\n breaks the line.")] = None,
    log_perplexity_limit: Annotated[
        float, typer.Option(metavar="X", help="Highest log perplexity shown; 0 for no limit.")
    ] = 5.0,
    skip_first: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, metavar="N", help="Rows of each run not to draw: perplexity is unstable at first."
        ),
    ] = 100,
    output: Annotated[
        Path | None,
        typer.Option(
            parser=place, metavar="FILE", help="A .png, .svg or .pdf; by default named by the features, in the folder."
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Open a window with the figure too.")] = False,
) -> None:
    """Draw the results in a folder: perplexity, memory and latency over the input length."""
    import numpy as np

    from sinkbench.results import figures
    from sinkbench.results.reading import read_runs

    warnings.filterwarnings("ignore", "Glyph")  # of a title or a name that the font has not: it shows as a box

    features = figures.checked(features)
    path = output or output_dir / f"{'_'.join(features)}.png"
    figures.check_format(path)
    runs = read_runs(output_dir)
    results = {name: run.frame for name, run in runs.items()}
    strategies = {name: run.strategy for name, run in runs.items()}
    with np.errstate(all="ignore"):  # what is no number is not drawn
        figure = figures.draw(results, features, title, log_perplexity_limit, skip_first, strategies)
    for note in figures.left_out(results, features, skip_first):
        typer.echo(f"note: {note}", err=True)
    figures.save(figure, path)
    typer.echo(f"saved {path}")
    if show:
        _show(figure, path)


def _show(figure: "Figure", path: Path) -> None:
    """A window, until it is closed."""
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    if pyplot.get_backend().lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise UserError(f"--show found no display or no window toolkit (such as tkinter): look at {path} instead")
    pyplot.figure(figure)
    pyplot.show()
