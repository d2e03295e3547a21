"""``sinkbench plot``: the figure of all runs in a folder."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import place, tokens_between
from sinkbench.errors import UserError
from sinkbench.results.columns import FRONTIER, OWN_FIGURES, RECALL, RETENTION, features_of
from sinkbench.validation import MOST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sinkbench.results.run import Run


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

    from sinkbench.results import figures
    from sinkbench.results.reading import read_runs

    warnings.filterwarnings("ignore", "Glyph")  # of a title or a name that the font has not: it shows as a box

    own = list(dict.fromkeys(name for name in features if name in OWN_FIGURES))
    curves = [name for name in features if name not in OWN_FIGURES]
    if curves or not own:
        curves = figures.checked(curves)
    span = _checked(own, baseline, ngram, tokens)
    path = output or output_dir / f"{'_'.join(curves or own[:1])}.png"
    figures.check_format(path)
    runs = read_runs(output_dir)
    strategies = {name: run.strategy for name, run in runs.items()}
    drawn, notes = {}, []
    with np.errstate(all="ignore"):  # what is no number is not drawn
        if curves:
            results = {name: run.frame for name, run in runs.items()}
            drawn[path] = figures.draw(results, curves, title, log_perplexity_limit, skip_first, strategies)
            notes += figures.left_out(results, curves, skip_first)
        for name in own:
            beside = path.with_stem(f"{path.stem}_{name}") if output else output_dir / f"{name}.png"
            file = beside if drawn else path
            if name == RETENTION:
                from sinkbench.results.retention import draw_retention, traces_of

                traces, lacking = traces_of(output_dir, runs)
                drawn[file] = draw_retention(traces, strategies, title)
                notes += lacking
            elif name == RECALL:
                drawn[file] = _recall(runs, baseline, 2 if ngram is None else ngram, span, title)
            else:
                drawn[file] = _frontier(runs, baseline, title)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    for file, figure in drawn.items():
        figures.save(figure, file)
        typer.echo(f"saved {file}")
    if show:
        _show(list(drawn.values()), path)


def _checked(
    own: list[str], baseline: str | None, ngram: int | None, tokens: str | None
) -> tuple[int | None, int | None]:
    """The tokens that count for recall; options that no feature asked for has are refused."""
    for option, value, names in (
        ("--baseline", baseline, (RECALL, FRONTIER)),
        ("--ngram", ngram, (RECALL,)),
        ("--tokens", tokens, (RECALL,)),
    ):
        if value is not None and not set(own) & set(names):
            raise UserError(f"{option} needs {' or '.join(names)} among --features")
    if ngram is not None and ngram < 2:
        raise UserError(f"--ngram is {ngram}: give 2 or more")
    return tokens_between(tokens)


def _needed(runs: "Mapping[str, Run]", asked: str | None, feature: str) -> "Run":
    from sinkbench.results.baseline import choose_baseline

    chosen = choose_baseline(list(runs.values()), asked)
    if chosen.run is None:
        raise UserError(f"the feature {feature} needs a baseline: {chosen.why.removeprefix('no baseline: ')}")
    return chosen.run


def _recall(
    runs: "Mapping[str, Run]", asked: str | None, ngram: int, span: tuple[int | None, int | None], title: str | None
) -> "Figure":
    from sinkbench.results.recall import recall_by_distance
    from sinkbench.results.recall_figure import draw_recall

    baseline = _needed(runs, asked, RECALL)
    found = recall_by_distance(runs, baseline, ngram, span)
    return draw_recall(found, baseline.name, ngram, {name: run.strategy for name, run in runs.items()}, title)


def _frontier(runs: "Mapping[str, Run]", asked: str | None, title: str | None) -> "Figure":
    from sinkbench.results.frontier import budgets
    from sinkbench.results.frontier_figure import draw_frontier

    baseline = _needed(runs, asked, FRONTIER)
    return draw_frontier(budgets(runs, baseline), baseline.name, title)


def _show(shown: "list[Figure]", path: Path) -> None:
    """A window for each figure, until they are closed."""
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    if pyplot.get_backend().lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise UserError(f"--show found no display or no window toolkit (such as tkinter): look at {path} instead")
    for figure in shown:
        pyplot.figure(figure)
    pyplot.show()
