"""Lines, axes and legends of a figure, in matplotlib."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinkbench.errors import UserError
from sinkbench.results.curves import DECADES, Curve
from sinkbench.results.looks import Look

INK, GREY, PALE = "#222222", "#555555", "#DDDDDD"
GAP = 10.0  # points between two axes on the right
DASHES = {  # lines and gaps, in line widths
    "--": (4.0, 3.0),
    ":": (1.0, 1.6),
    "-.": (6.0, 2.0, 1.0, 2.0),
    "-..": (6.0, 2.0, 1.0, 1.5, 1.0, 2.0),
    "--.": (4.0, 2.0, 4.0, 2.0, 1.0, 2.0),
}
STRIPE = 8.0  # line widths of each colour where runs coincide in a line without gaps
MARKS = 9  # on a line
PLACES = ("left axis", "right axis", "outer right axis")
FEATURES = "Feature (line)"
WIDTH, HANDLE = 118, 9  # characters that a legend has room for, and those that the line before a label takes


def set_limits(ax: Axes, curves: Mapping[str, Curve], limit: float) -> None:
    """Set the bounds of the y axis so that what lies under ``limit`` fills it; 0 is no limit.

    Raises:
        UserError: everything lies above.
    """
    low = min((float(y.min()) for _, y in curves.values()), default=0.0)
    high = max((float(y.max()) for _, y in curves.values()), default=1.0)
    if limit and not low < limit:
        raise UserError(f"every log perplexity is above --log-perplexity-limit {limit:g} (least: {low:.2f}): give more")
    top = high + 0.05 * max(high - low, 0.1 * abs(high), 1e-9)
    top = min(top, limit) if limit else top
    ax.set_ylim(low - 0.05 * max(top - low, 0.1 * abs(low)), top)


def set_logarithmic(ax: Axes, curves: Mapping[str, Curve]) -> dict[str, tuple[int, int]]:
    """Make the y axis of ``curves``, which are above 0, logarithmic; answers as :func:`coinciding` does for it."""
    logs = {name: (x, np.log10(y)) for name, (x, y) in curves.items()}
    low = min((float(y.min()) for _, y in logs.values()), default=0.0)
    high = max((float(y.max()) for _, y in logs.values()), default=1.0)
    low = max(low, high - DECADES)
    room = 0.05 * max(high - low, 0.2)
    ax.set_yscale("log")
    ax.set_ylim(10 ** (low - room), 10 ** (high + room))
    return coinciding(logs, (low - room, high + room))


def coinciding(
    curves: Mapping[str, Curve], limits: tuple[float, float], share: float = 0.9
) -> dict[str, tuple[int, int]]:
    """For each run, which it is (from 0) of how many whose lines lie on each other, for at least this ``share``."""
    groups: list[list[str]] = []
    for name, curve in curves.items():
        mine = next((group for group in groups if _coincide(curves[group[0]], curve, limits, share)), None)
        groups.append([name]) if mine is None else mine.append(name)
    return {name: (place, len(group)) for group in groups for place, name in enumerate(group)}


def _coincide(one: Curve, other: Curve, limits: tuple[float, float], share: float) -> bool:
    """Whether this ``share`` of the longer line lies no more than a line's width from the other."""
    start, end = min(one[0][0], other[0][0]), max(one[0][-1], other[0][-1])
    x = np.linspace(start, end, 200)
    distance = np.abs(np.interp(x, *one, np.nan, np.nan) - np.interp(x, *other, np.nan, np.nan))
    return bool((distance <= 0.004 * (limits[1] - limits[0])).mean() >= share)


def draw_run(
    ax: Axes, curve: Curve, label: str, look: Look, line: str, of_group: tuple[int, int], phase: float
) -> None:
    """One run; an arrowhead marks where it leaves through the top for good.

    Args:
        ax: where, its limits set.
        curve: what.
        label: as matplotlib keeps it.
        look: colour and mark.
        line: a key of :data:`DASHES`, or ``-``.
        of_group: as :func:`coinciding` says; lines that lie on each other are stripes of one line.
        phase: from 0 to 1, where on a line its marks are, so that not all of a figure are in one place.
    """
    x, y = curve
    above = 2 + 1 / (1 + float(x[-1]))  # where runs coincide in part, the shorter lies on the longer
    ax.plot(
        x,
        y,
        linestyle=_style(line, *of_group),
        linewidth=2.2 if line == ":" else 1.7,
        label=label,
        zorder=above,
        markevery=_marked(curve, ax.get_ylim()[1], phase),
        **(mark_of(look) if look.marker else {"color": look.colour, "marker": "o" if len(x) == 1 else ""}),
    )
    top = ax.get_ylim()[1]
    if y[-1] > top:
        under = np.flatnonzero(y <= top)
        leaves = x[0]
        if len(under):
            last = int(under[-1])
            leaves = np.interp(top, y[last : last + 2], x[last : last + 2])
        arrow: dict[str, Any] = {"marker": "^", "markersize": 8, "color": look.colour}
        ax.plot([leaves], [top], **arrow, clip_on=False, zorder=4, label=f"_{label} leaves")


def _style(line: str, place: int, count: int) -> Any:
    """The style of a line, the stripe ``place`` of ``count`` where several lie on each other."""
    dashes = DASHES.get(line)
    if count == 1:
        return (0.0, dashes) if dashes else line
    drawn, gap = (dashes[0], min(sum(dashes) - dashes[0], 1.6)) if dashes else (STRIPE, 0.0)
    slot = drawn + gap
    return (-place * slot, (drawn, count * slot - drawn))


def mark_of(look: Look) -> dict[str, Any]:
    """Colour and marker of a line."""
    inside = "white" if look.hollow else look.colour
    edge = look.colour if look.hollow or look.marker.startswith("$") else "white"
    size = {"*": 11.0, "D": 6.0, "s": 6.5, "^": 8.5, "v": 8.5, ">": 8.5}.get(look.marker, 7.5)
    return {
        "color": look.colour,
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": inside,
        "markeredgecolor": edge,
        "markeredgewidth": 1.4 if look.hollow else 0.7,
    }


def _marked(curve: Curve, top: float, phase: float) -> list[int]:
    """The points of a line that carry its mark, spread over what of it is to be seen."""
    x, y = curve
    seen = np.flatnonzero(y <= top)
    if not len(seen):
        return [0]
    start, end = x[seen[0]], x[seen[-1]]
    wanted = start + (end - start) * (np.arange(MARKS) + 0.1 + 0.8 * phase) / MARKS
    return sorted({int(seen[min(place, len(seen) - 1)]) for place in np.searchsorted(x[seen], wanted)})


def dress(ax: Axes, first: bool) -> None:
    """Ticks, grid and frame of one axis; the first one carries what all share."""
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    ax.spines["top"].set_visible(False)
    for side in ("left", "right", "bottom"):
        ax.spines[side].set_color(GREY)
    if not first:
        ax.spines["left"].set_visible(False)
        return
    ax.spines["right"].set_visible(False)
    ax.set_xlabel("Input length (tokens)", fontsize=11, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.margins(x=0.01)
    ax.grid(color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)


def space_axes(figure: Figure, axes: Sequence[Axes]) -> None:
    """Move each right axis beyond the labels of the one before."""
    for inner, outer in pairwise(axes[1:]):
        figure.draw_without_rendering()
        reach = inner.yaxis.label.get_window_extent().x1 - inner.bbox.x1
        outer.spines["right"].set_position(("outward", reach * 72 / figure.dpi + GAP))


def legend_shape(names: Sequence[str], labels: Sequence[str]) -> tuple[int, int]:
    """In how many columns the legend names runs, and how many rows it then has, its heading left out.

    ``labels`` are those of the features, which have a column of their own.
    """
    left = WIDTH - max(map(len, labels)) - len(PLACES[-1]) - HANDLE
    fitting = max(1, left // (max(map(len, names), default=0) + HANDLE))
    columns = min(-(-len(names) // 5), fitting, 4)
    return columns, max(-(-len(names) // max(columns, 1)), len(labels))


def draw_legend(figure: Figure, looks: Mapping[str, Look], lines: Sequence[tuple[str, str]]) -> None:
    """Below the axes: which colour and mark is which run, which line is which feature.

    Args:
        figure: whose legend.
        looks: by run.
        lines: label and style of each feature, in the order of their axes.
    """
    columns, rows = legend_shape(list(looks), [label for label, _ in lines])
    nothing: dict[str, Any] = {"linestyle": "none"}
    blank = (" ", nothing)
    heading = "Strategy (colour and mark)" if any(look.marker for look in looks.values()) else "Strategy (colour)"
    runs: list[tuple[str, dict[str, Any]]] = []
    for name, look in looks.items():
        line = {"linewidth": 2.5, **mark_of(look)} if look.marker else {"color": look.colour, "linewidth": 5.0}
        runs.append((name, line))
    entries: list[tuple[str, dict[str, Any]]] = []
    for column in range(columns):
        part = runs[column * rows : (column + 1) * rows]
        entries += [(heading, nothing) if not column else blank, *part, *[blank] * (rows - len(part))]
    entries.append((FEATURES, nothing))
    for number, (label, style) in enumerate(lines):
        place = PLACES[min(number, len(PLACES) - 1)]
        entries.append((f"{label}, {place}", {"color": GREY, "linewidth": 2.0, "linestyle": _style(style, 0, 1)}))
    entries += [blank] * (rows - len(lines))
    handles = [Line2D([], [], **look) for _, look in entries]
    labels = [label for label, _ in entries]
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns + 1, fontsize=10, frameon=False, handlelength=2.6
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(INK)
        text.set_fontweight("bold" if text.get_text() in (heading, FEATURES) else "normal")
