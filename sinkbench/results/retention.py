"""The figure of what was kept: which tokens are held after which step, and how long tokens live.

A panel a run: across, the tokens fed; upwards, where a token stands in the text; the darker, the more heads of all
layers hold it. Below them, the share of tokens that live for at least so many steps.
"""

import math
import textwrap
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from sinkbench.errors import UserError
from sinkbench.results.axes import GREY, INK, PALE, coinciding, draw_run, mark_of
from sinkbench.results.curves import Curve, thinned
from sinkbench.results.looks import Look, looks_of
from sinkbench.results.run import Run
from sinkbench.results.traces import HELD, Lifetimes, read_trace, trace_of

BINS = 400  # of tokens and of steps in a panel: about as many as it has pixels
POINTS = 2_000  # of a curve
PANEL = 2.75  # inches
FEW = 5  # curves, for which the room of one panel will do
WIDTH = 22  # characters over a panel
TITLE = "Which tokens are kept, and for how long"
MAKE = "sinkbench run --trace writes it, with --resume beside rows that are there"
SHARES = LinearSegmentedColormap.from_list("shares", ["#FFFFFF", "#D8E8F4", "#9CC6E3", "#4F9CCB", "#1A6CA8", "#0B3F73"])
SCALE = PowerNorm(0.5, 0, 1)  # so that what a single head holds is seen too


def traces_of(runs: Mapping[str, Run]) -> tuple[dict[str, Lifetimes], list[str]]:
    """The traces beside the rows of ``runs``, by run; and a line for each run that has none.

    Raises:
        UserError: no run has one, or one cannot be read.
    """
    found, notes = {}, []
    for name, run in runs.items():
        path = trace_of(run.path) if run.path else None
        if path is None or not path.exists():
            notes.append(f"{name} has no trace: {_why(run)}")
            continue
        kept = read_trace(path)
        if kept.lifetime.size:
            found[name] = kept
        else:
            notes.append(f"{name} is not shown: the model's own windows decide what its layers keep")
    if not found:
        where = " and ".join(sorted({str(run.path.parent) for run in runs.values() if run.path}))
        raise UserError(f"no run in {where} has a trace of what was kept: {MAKE}")
    return found, notes


def _why(run: Run) -> str:
    return "it carries no cache" if run.strategy == "recompute" else MAKE


def draw_retention(
    traces: Mapping[str, Lifetimes], strategies: Mapping[str, str] | None = None, title: str | None = None
) -> Figure:
    """The figure of ``traces``, which are by run.

    Args:
        strategies: of each run that is shown on the same page; by default as the traces say.
        title: instead of the usual one; ``\\n`` in two characters is a line break too.
    """
    looks = looks_of(strategies or {name: kept.strategy for name, kept in traces.items()})
    columns, rows, below = grid_of(len(traces))
    height = PANEL * rows + (0.9 if title and "\\n" in title else 0.6)
    figure = Figure(figsize=(PANEL * columns + 0.5, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    alike = len({kept.tokens for kept in traces.values()}) == 1
    grid = figure.add_gridspec(rows, columns)
    for number, (name, kept) in enumerate(traces.items()):
        row, column = divmod(number, columns)
        ax = figure.add_subplot(grid[row, column])
        image = draw_map(ax, kept)
        _head(ax, name, looks[name])
        _name_axes(ax, column == 0, number + columns >= len(traces), alike)
        if not number:
            _key(figure, ax, image)
    survivals = {name: survival(kept) for name, kept in traces.items()}
    draw_survivals(figure.add_subplot(grid[below]), survivals, looks)
    figure.suptitle((title or TITLE).replace("\\n", "\n"), fontsize=14, color=INK, parse_math=False)
    return figure


def grid_of(panels: int) -> tuple[int, int, tuple[int, slice]]:
    """Columns and rows for so many panels and the curves behind them, and the place of the curves.

    They take what the panels leave of the last row, or a row of their own where that is little.
    """
    columns = max(2, min(4, math.ceil(math.sqrt(panels + 1))))
    row, used = divmod(panels, columns)
    if columns - used < (1 if panels <= FEW else 2):
        row, used = row + 1, 0
    return columns, row + 1, (row, slice(used, columns))


def shares_held(kept: Lifetimes, bins: int = BINS) -> np.ndarray:
    """The share of (layer, head) pairs that hold a token after a step, in bins: tokens down, steps across.

    Of several tokens in a bin it is the mean, after the last step in a bin; NaN where tokens are still to come.
    """
    n = kept.tokens
    size = min(n, bins)
    ends = (np.arange(1, size + 1) * n) // size  # behind the last token, and behind the last step, of each bin
    bin_of = np.searchsorted(ends, np.arange(n), side="right")
    change, heads = np.zeros((size, size + 1)), 0
    for lifetime in kept.heads():
        heads += len(lifetime)
        gone = np.where(lifetime == HELD, n, np.arange(n) + lifetime)  # the first step that finds it gone
        columns = np.searchsorted(ends - 1, gone.ravel())
        at = np.broadcast_to(bin_of, lifetime.shape).ravel() * (size + 1) + columns
        change -= np.bincount(at, minlength=change.size).reshape(change.shape)
    width = np.diff(ends, prepend=0)
    change[np.arange(size), np.arange(size)] += width * heads
    shares = change.cumsum(1)[:, :size] / (width * heads)[:, None]
    return np.where(np.tri(size, dtype=bool).T, shares, np.nan)


def survival(kept: Lifetimes) -> Curve:
    """Steps, and the share of tokens, of all heads, that can be attended to for at least so many.

    Those that are held at the end may live on, so it is Kaplan and Meier's estimate.
    """
    n = kept.tokens
    went, stayed = np.zeros(n + 1), np.zeros(n + 1)
    age = np.arange(n, 0, -1)
    for lifetime in kept.heads():
        held = lifetime == HELD
        went += np.bincount(lifetime[~held], minlength=n + 1)
        stayed += np.bincount(np.broadcast_to(age, lifetime.shape)[held], minlength=n + 1)
    at_risk = (went + stayed)[::-1].cumsum()[::-1]
    steps = np.arange(1, n + 1)[at_risk[1:] > 0]
    share = np.concatenate(([1.0], (1 - went[steps] / at_risk[steps]).cumprod()))
    if share[-1] > 0:  # how many live on beyond the last step nobody knows
        return steps, share[:-1]
    return np.append(steps, steps[-1] + 1), share


def draw_map(ax: Axes, kept: Lifetimes) -> AxesImage:
    """One panel."""
    n = kept.tokens
    extent = (0.0, float(n), 0.0, float(n))
    image = ax.imshow(
        shares_held(kept), cmap=SHARES, norm=SCALE, origin="lower", extent=extent, interpolation="nearest", zorder=2
    )
    ax.plot([0, n], [0, n], color=PALE, linewidth=0.7, zorder=1)  # where a token comes
    _dress(ax)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10], integer=True))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return image


def draw_survivals(ax: Axes, curves: Mapping[str, Curve], looks: Mapping[str, Look]) -> None:
    """How long tokens live, of all runs, over the logarithm of steps."""
    decades = {name: (np.log10(x), y) for name, (x, y) in curves.items()}
    last = max(float(x[-1]) for x, _ in decades.values())
    ax.set_xlim(0, max(last, 0.3))
    ax.set_yscale("function", functions=(np.sqrt, np.square))  # as the colours are
    ax.set_ylim(0, 1.03)
    groups = coinciding(decades, ax.get_ylim(), share=1)
    for number, (name, curve) in enumerate(decades.items()):
        draw_run(ax, thinned(*curve, POINTS), name, looks[name], "-", groups[name], number / len(curves))
    _dress(ax, "right")  # so that the columns of panels stand close
    ax.xaxis.set_major_locator(MultipleLocator(1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:,.0f}"))
    ax.set_yticks([0, 0.01, 0.1, 0.25, 0.5, 1], labels=["0", "1", "10", "25", "50", "100 %"])
    ax.set_xlabel("Steps", fontsize=10, color=INK)
    ax.set_title("Tokens that live so long", fontsize=10.5, color=INK, loc="left")
    ax.grid(color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)


def _dress(ax: Axes, upright: Literal["left", "right"] = "left") -> None:
    """Ticks and frame, with the y axis on the side ``upright``."""
    ax.yaxis.set_ticks_position(upright)
    ax.tick_params(labelsize=8.5, color=GREY, labelcolor=INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("bottom", upright))
        spine.set_color(GREY)
        if spine.get_visible():
            spine.set_position(("outward", 3))  # beside the first tokens, not over them


def _name_axes(ax: Axes, first: bool, lowest: bool, alike: bool) -> None:
    """What the axes are, at the edge of the grid; where all panels are ``alike``, numbers too stand there alone."""
    if first:
        ax.set_ylabel("Position in the text", fontsize=10, color=INK)
    if lowest:
        ax.set_xlabel("Tokens fed", fontsize=10, color=INK)
    ax.tick_params(labelleft=first or not alike, labelbottom=lowest or not alike)


def _head(ax: Axes, name: str, look: Look) -> None:
    """The name of a run over its panel, with the line that it has among the curves."""
    line: dict[str, Any] = mark_of(look) if look.marker else {"color": look.colour}
    handle = Line2D([], [], linewidth=3.0, **line)
    legend = ax.legend(
        [handle],
        [textwrap.fill(name, WIDTH)],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.1,
        borderpad=0.2,
        frameon=False,
        handlelength=1.8,
        fontsize=10.5,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(INK)


def _key(figure: Figure, ax: Axes, image: AxesImage) -> None:
    """What the colours mean, where a panel is empty: above the line on which tokens come."""
    bar = figure.colorbar(image, cax=ax.inset_axes((0.05, 0.86, 0.5, 0.04)), orientation="horizontal")
    bar.set_ticks([0, 0.1, 0.5, 1], labels=["0", "10", "50", "100 %"])
    bar.ax.set_title("Heads that hold a token", fontsize=8.5, color=INK, loc="left", pad=4)
    bar.ax.tick_params(labelsize=7.5, labelcolor=INK, color=GREY, length=2, pad=2)
    bar.outline.set_edgecolor(GREY)
    bar.outline.set_linewidth(0.5)
