"""``sinkbench.plot``: the figure of runs."""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbench.errors import UserError
from sinkbench.results.columns import RETENTION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sinkbench.results.run import Run

FEATURES = ("perplexity", "vram")
LOG_PERPLEXITY_LIMIT = 5.0
SKIP_FIRST = 100  # rows


def plot(
    output_dir: Any = "results",
    features: str | Sequence[str] = FEATURES,
    title: str | None = None,
    log_perplexity_limit: float = LOG_PERPLEXITY_LIMIT,
    skip_first: int = SKIP_FIRST,
    output: str | Path | None = None,
    show: bool = False,
) -> "Figure | tuple[Figure, ...]":
    """As ``sinkbench plot``: perplexity, memory, latency and whatever else is measured, over the input length.

    Args:
        output_dir: a folder or files of runs, or runs that are at hand.
        features: the first on the left axis, each further one on its own right axis; ``retention`` is a figure of its
            own, of runs with ``trace=True``.
        title: ``\\n`` breaks the line.
        log_perplexity_limit: the highest log perplexity shown; 0 for no limit.
        skip_first: rows of each run not to draw: perplexity is unstable at first.
        output: a .png, .svg or .pdf to write it to. The command line always writes one.
        show: whether to open a window too.

    Returns:
        A figure of matplotlib, which a notebook shows; with ``retention`` beside other features, two.

    Raises:
        UserError: an unknown feature, or nothing to draw.
    """
    import numpy as np

    from sinkbench.library.reading import runs_of
    from sinkbench.results import figures

    chosen = [features] if isinstance(features, str) else list(features)
    checked_features(chosen)
    path = None if output is None else Path(output)
    if path is not None:
        figures.check_format(path)
    with np.errstate(all="ignore"):  # what is no number is not drawn
        drawn, notes = drawn_of(runs_of([output_dir]), chosen, title, log_perplexity_limit, skip_first)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    if path is not None:
        for name, figure in drawn.items():
            figures.save(figure, path if name != RETENTION or len(drawn) == 1 else beside(path))
    for figure in drawn.values():
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined] # what a notebook shows
    if show:
        in_windows(list(drawn.values()), path)
    first, *others = drawn.values()
    return (first, *others) if others else first


def checked_features(features: Sequence[str]) -> list[str]:
    """The features of curves among ``features``, each once.

    Raises:
        UserError: none at all, or one that does not exist.
    """
    from sinkbench.results import figures

    curves = [name for name in features if name != RETENTION]
    return figures.checked(curves) if curves or RETENTION not in features else []


def drawn_of(
    runs: "Mapping[str, Run]", features: Sequence[str], title: str | None, log_perplexity_limit: float, skip_first: int
) -> "tuple[dict[str, Figure], list[str]]":
    """The figures of ``runs``, by what they show, curves or retention; and lines on what they do not show.

    Raises:
        UserError: an unknown feature, or nothing to draw.
    """
    from sinkbench.results import figures

    curves = checked_features(features)
    strategies = {name: run.strategy for name, run in runs.items()}
    drawn, notes = {}, []
    if curves:
        results = {name: run.frame for name, run in runs.items()}
        drawn["_".join(curves)] = figures.draw(results, curves, title, log_perplexity_limit, skip_first, strategies)
        notes += figures.left_out(results, curves, skip_first)
    if RETENTION in features:
        from sinkbench.results.retention import draw_retention, traces_of

        traces, lacking = traces_of(runs)
        drawn[RETENTION] = draw_retention(traces, strategies, title)
        notes += lacking
    return drawn, notes


def beside(path: Path) -> Path:
    """Where the figure of retention goes beside one of curves at ``path``."""
    return path.with_stem(f"{path.stem}_{RETENTION}")


def in_windows(shown: "Sequence[Figure]", path: Path | None) -> None:
    """A window for each figure, until they are closed.

    Raises:
        UserError: there is no display; the figure is at ``path``.
    """
    from matplotlib import pyplot
    from matplotlib.backends.registry import BackendFilter, backend_registry

    if pyplot.get_backend().lower() in backend_registry.list_builtin(BackendFilter.NON_INTERACTIVE):
        raise UserError(
            "--show found no display or no window toolkit (such as tkinter): "
            + (f"look at {path} instead" if path else "give --output, and look at that file")
        )
    for figure in shown:
        pyplot.figure(figure)
    pyplot.show()


def _png(figure: "Figure") -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return buffer.getvalue()
