"""Axes of losses in nats, and the legend of figures in which a line is a run or a strategy."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sinkbench.results.axes import GREY, INK, PALE, WIDTH, mark_of
from sinkbench.results.intervals import Interval
from sinkbench.results.looks import Look
from sinkbench.results.loss_scale import NEAR, is_logarithmic, tick_text, ticks


def scale_losses(ax: Axes, values: Sequence[float]) -> bool:
    """Let ``values`` fill the y axis, which is logarithmic beyond ``NEAR`` where they are far apart; whether it is."""
    low, high = min(0.0, *values), max(0.0, *values)
    logarithmic = is_logarithmic(values)
    if logarithmic:
        ax.set_yscale("symlog", linthresh=NEAR, linscale=0.6)
        ax.yaxis.set_major_locator(FixedLocator(ticks(values)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(low * 1.3 - NEAR / 4, high * 1.3)
    else:
        room = 0.06 * (high - low or 1.0)
        ax.set_ylim(low - room, high + room)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_text(value)))
    ax.axhline(0, color=GREY, linewidth=0.9, zorder=1)
    return logarithmic


def dress_losses(ax: Axes) -> None:
    """Grid and frame."""
    ax.tick_params(labelsize=10, color=GREY, labelcolor=INK)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    ax.grid(color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)


def line_look(look: Look) -> dict[str, Any]:
    """Colour and mark of a line each of whose points is marked."""
    plain = {"color": look.colour, "marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.5}
    return mark_of(look) if look.marker else plain


def legend_rows(names: Sequence[str]) -> tuple[int, int]:
    """In how many columns and rows :func:`draw_line_legend` names lines."""
    columns = max(1, min(5, len(names), WIDTH // (max(map(len, names), default=1) + 9)))
    return columns, -(-len(names) // columns)


def draw_line_legend(figure: Figure, looks: Mapping[str, Look], further: Mapping[str, dict[str, Any]]) -> None:
    """Below the axes: which line is which, and what else there is.

    Args:
        figure: whose legend.
        looks: by name.
        further: what :class:`matplotlib.lines.Line2D` takes, by what it means.
    """
    handles = [Line2D([], [], linewidth=2.0, **line_look(look)) for look in looks.values()]
    handles += [Line2D([], [], **line) for line in further.values()]
    labels = [*looks, *further]
    columns, _ = legend_rows(labels)
    legend = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, fontsize=10, frameon=False, handlelength=2.6
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(INK)


def bars(losses: Sequence[Interval]) -> np.ndarray:
    """How far intervals reach below and above their values, as matplotlib takes it, shape ``(2, n)``.

    Where all values are alike, rounding may put a bound on the wrong side.
    """
    reach = [[loss.value - loss.low for loss in losses], [loss.high - loss.value for loss in losses]]
    return np.maximum(reach, 0.0)
