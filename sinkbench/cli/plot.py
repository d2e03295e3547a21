"""``sinkbench plot``: the figure of all runs in a folder."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.errors import UserError
from sinkbench.results.columns import RETENTION, features_of
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
            "first on the left axis, each further one on its own right axis. retention is a figure of its own: which "
            "tokens are held, of runs with --trace.",
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
            parser=place,
            metavar="FILE",
            help="A .png, .svg or .pdf; by default named by the features, in the folder. Beside other features, "
            "retention goes to FILE_retention.",
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Open a window with the figure too.")] = False,
) -> None:
    """Draw the results in a folder: perplexity, memory and latency over the input length, and what was kept."""
    import numpy as np

    from sinkbench.results import figures
    from sinkbench.results.reading import read_runs

    warnings.filterwarnings("ignore", "Glyph")  # of a title or a name that the font has not: it shows as a box

    curves = [name for name in features if name != RETENTION]
    if curves or RETENTION not in features:
        curves = figures.checked(curves)
    path = output or output_dir / f"{'_'.join(curves or [RETENTION])}.png"
    figures.check_format(path)
    runs = read_runs(output_dir)
    strategies = {name: run.strategy for name, run in runs.items()}
    drawn, notes = {}, []
    if curves:
        results = {name: run.frame for name, run in runs.items()}
        with np.errstate(all="ignore"):  # what is no number is not drawn
            drawn[path] = figures.draw(results, curves, title, log_perplexity_limit, skip_first, strategies)
        notes += figures.left_out(results, curves, skip_first)
    if RETENTION in features:
        from sinkbench.results.retention import draw_retention, traces_of

        traces, lacking = traces_of(output_dir, runs)
        beside = path.with_stem(f"{path.stem}_{RETENTION}") if output else output_dir / f"{RETENTION}.png"
        drawn[beside if curves else path] = draw_retention(traces, strategies, title)
        notes += lacking
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    for file, figure in drawn.items():
        figures.save(figure, file)
        typer.echo(f"saved {file}")
    if show:
        _show(list(drawn.values()), path)


def _show(shown: "list[Figure]", path: Path) -> None:
    """A window for each figure, until they are closed."""
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    if pyplot.get_backend().lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise UserError(f"--show found no display or no window toolkit (such as tkinter): look at {path} instead")
    for figure in shown:
        pyplot.figure(figure)
    pyplot.show()
