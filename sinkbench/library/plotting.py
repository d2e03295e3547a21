"""``sinkbench.plot``: the figure of runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sinkbench.config import configured
from sinkbench.errors import UserError
from sinkbench.library.asking import plain
from sinkbench.library.comparing import Span, checked_ngram, needed, tokens_between
from sinkbench.results.columns import FRONTIER, OWN_FIGURES, RECALL, RETENTION
from sinkbench.validation import File, Flag, Heat, SizeOrZero, Text, must

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
    baseline: str | None = None,
    ngram: int | None = None,
    tokens: str | Span | None = None,
    output: str | Path | None = None,
    show: bool = False,
) -> "Figure | tuple[Figure, ...]":
    """As ``sinkbench plot``: perplexity, memory, latency and whatever else is measured, over the input length.

    Args:
        output_dir: a folder or files of runs, or runs that are at hand.
        features: the first on the left axis, each further one on its own right axis. Figures of their own:
            ``retention``, which tokens are held, of runs with ``trace=True``; ``recall``, the loss by how many tokens
            back a pair was last seen; ``frontier``, the loss against what the cache holds.
        title: ``\\n`` breaks the line.
        log_perplexity_limit: the highest log perplexity shown; 0 for no limit.
        skip_first: rows of each run not to draw: perplexity is unstable at first.
        baseline: of recall and frontier, as of :func:`sinkbench.compare`.
        ngram: of recall, likewise.
        tokens: of recall, likewise.
        output: a .png, .svg or .pdf to write it to. The command line always writes one.
        show: whether to open a window too.

    Returns:
        A figure of matplotlib, which a notebook shows; with figures of their own beside other features, several.

    Raises:
        UserError: an unknown feature, or nothing to draw.
    """
    import numpy as np

    from sinkbench.library.reading import runs_of
    from sinkbench.results import figures

    given = {
        **{"features": _several(features), "title": title, "log_perplexity_limit": log_perplexity_limit},
        **{"skip_first": skip_first, "baseline": baseline, "output": output, "show": show},
    }
    arguments = configured(_Arguments, {name: plain(value) for name, value in given.items()})
    asked = asked_figures(arguments.features, baseline, ngram, tokens)
    path = arguments.output
    if path is not None:
        figures.check_format(path)
    with np.errstate(all="ignore"):  # what is no number is not drawn
        drawn, notes = drawn_of(
            runs_of([output_dir]), asked, title, arguments.log_perplexity_limit, arguments.skip_first
        )
    for note in notes:
        warnings.warn(note, stacklevel=2)
    for name, figure in drawn.items():
        figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined] # what a notebook shows
        if path is not None:
            figures.save(figure, path if name == asked.first else beside(path, name))
    if show:
        in_windows(list(drawn.values()), path)
    first, *others = drawn.values()
    return (first, *others) if others else first


class _Arguments(BaseModel):
    """What :func:`plot` takes beside the runs and what belongs to recall."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    features: Annotated[list[str], must("names of features")]
    title: Annotated[str, must("a text")] | None
    log_perplexity_limit: Heat
    skip_first: SizeOrZero
    baseline: Text | None
    output: Annotated[File | None, Field(strict=False)]
    show: Flag


def _several(features: Any) -> Any:
    return [features] if isinstance(features, str) else list(features) if isinstance(features, Sequence) else features


@dataclass(frozen=True)
class Asked:
    """Which figures, and of what.

    Attributes:
        curves: features of the first figure; there is none where this is empty.
        own: those that have a figure of their own.
    """

    curves: list[str]
    own: list[str]
    baseline: str | None
    ngram: int
    span: Span

    @property
    def first(self) -> str:
        """What the first figure is called."""
        return "_".join(self.curves or self.own[:1])


def asked_figures(
    features: Sequence[str], baseline: str | None = None, ngram: int | None = None, tokens: str | Span | None = None
) -> Asked:
    """The figures that ``features`` ask for.

    Raises:
        UserError: no feature, one that does not exist, or an option that none of them has.
    """
    from sinkbench.results import figures

    own = list(dict.fromkeys(name for name in features if name in OWN_FIGURES))
    curves = [name for name in features if name not in OWN_FIGURES]
    if curves or not own:
        curves = figures.checked(curves)
    for option, value, names in (
        ("--baseline", baseline, (RECALL, FRONTIER)),
        ("--ngram", ngram, (RECALL,)),
        ("--tokens", tokens, (RECALL,)),
    ):
        if value is not None and not set(own) & set(names):
            raise UserError(f"{option} needs {' or '.join(names)} among --features")
    return Asked(curves, own, baseline, checked_ngram(ngram), tokens_between(tokens))


def drawn_of(
    runs: "Mapping[str, Run]", asked: Asked, title: str | None, log_perplexity_limit: float, skip_first: int
) -> "tuple[dict[str, Figure], list[str]]":
    """The figures of ``runs``, by what they are called; and lines on what they do not show.

    Raises:
        UserError: nothing to draw.
    """
    from sinkbench.results import figures

    strategies = {name: run.strategy for name, run in runs.items()}
    drawn, notes = {}, []
    if asked.curves:
        results = {name: run.frame for name, run in runs.items()}
        drawn[asked.first] = figures.draw(results, asked.curves, title, log_perplexity_limit, skip_first, strategies)
        notes += figures.left_out(results, asked.curves, skip_first)
    for name in asked.own:
        if name == RETENTION:
            from sinkbench.results.retention import draw_retention, traces_of

            traces, lacking = traces_of(runs)
            drawn[name] = draw_retention(traces, strategies, title)
            notes += lacking
        else:
            drawn[name] = (_recall if name == RECALL else _frontier)(runs, asked, title)
    return drawn, notes


def _recall(runs: "Mapping[str, Run]", asked: Asked, title: str | None) -> "Figure":
    from sinkbench.results.recall import recall_by_distance
    from sinkbench.results.recall_figure import draw_recall

    baseline = needed(runs, asked.baseline, f"the feature {RECALL}")
    found = recall_by_distance(runs, baseline, asked.ngram, asked.span)
    return draw_recall(found, baseline.name, asked.ngram, {name: run.strategy for name, run in runs.items()}, title)


def _frontier(runs: "Mapping[str, Run]", asked: Asked, title: str | None) -> "Figure":
    from sinkbench.results.frontier import budgets
    from sinkbench.results.frontier_figure import draw_frontier

    baseline = needed(runs, asked.baseline, f"the feature {FRONTIER}")
    return draw_frontier(budgets(runs, baseline), baseline.name, title)


def beside(path: Path, name: str) -> Path:
    """Where the figure of ``name`` goes beside one at ``path``."""
    return path.with_stem(f"{path.stem}_{name}")


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
