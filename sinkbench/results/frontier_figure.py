"""The figure of the frontier: what the cache holds, or how long a step takes, against what is lost."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sinkbench.errors import UserError
from sinkbench.results.axes import INK
from sinkbench.results.files import encodable
from sinkbench.results.frontier import Budgeted, judged_by_kl
from sinkbench.results.looks import Look, looks_of
from sinkbench.results.loss_axes import (
    bars,
    draw_line_legend,
    dress_losses,
    legend_rows,
    line_look,
    scale_losses,
)
from sinkbench.results.loss_scale import cost_ticks, finite

FRONTIER: dict[str, Any] = {
    "color": "#8C8C8C",  # wide and pale: no line of a strategy is
    "linewidth": 7.0,
    "alpha": 0.4,
    "solid_capstyle": "round",
    "marker": "o",
    "markersize": 13.0,
    "markeredgewidth": 0.0,
}
Cost = Callable[[Budgeted], float | None]


def draw_frontier(found: Sequence[Budgeted], baseline: str, title: str | None = None) -> Figure:
    """The figure of ``found``: a line a strategy over its budgets, and a panel for latencies where there are any.

    The loss is that by which the frontier is judged (:class:`sinkbench.results.frontier.Budgeted`).

    Args:
        found: by cost and loss.
        baseline: the run that they are compared to.
        title: instead of the usual one; ``\\n`` in two characters is a line break too.

    Raises:
        UserError: fewer than two runs say what their cache holds.
    """
    divergence = judged_by_kl(found, baseline)
    panels: list[tuple[str, Cost, Callable[[Budgeted], bool | None], float]] = []
    for label, cost, best, factor in (
        ("Bytes that the cache holds (MiB)", lambda one: one.held, lambda one: one.best, 2.0**-20),
        ("A step, median (ms)", lambda one: one.latency, lambda one: one.fastest, 1e3),
    ):
        if sum(cost(one) is not None for one in found) > 1:
            panels.append((label, cost, best, factor))
    if not panels:
        raise UserError("fewer than two runs say what their cache holds (no kv_cache_bytes): run the experiments again")
    known = [one for one in found if any(cost(one) is not None for _, cost, _, _ in panels)]
    looks = looks_of({encodable(one.series): one.strategy for one in known})
    _, rows = legend_rows([*looks, "frontier"])
    size = (10.0 if len(panels) == 1 else 13.0, 5.2 + 0.2 * rows)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    for number, (label, cost, best, factor) in enumerate(panels):
        ax = figure.add_subplot(1, len(panels), number + 1)
        _draw(ax, [one for one in found if cost(one)], cost, best, factor, looks)
        ax.set_xlabel(label, fontsize=11, color=INK)
        if not number:
            of = "KL to the reference" if divergence else f"NLL above {encodable(baseline)}"
            ax.set_ylabel(f"{of} (nats), lower is better", fontsize=11, color=INK, parse_math=False)
    draw_line_legend(figure, looks, {"frontier": FRONTIER})
    lines = (title or "What a budget costs, and what it loses").replace("\\n", "\n").split("\n")
    text = "\n".join(textwrap.fill(encodable(line), 90) for line in lines)
    figure.suptitle(text, fontsize=14, color=INK, parse_math=False)
    return figure


def _draw(
    ax: Axes,
    found: Sequence[Budgeted],
    cost: Cost,
    best: Callable[[Budgeted], bool | None],
    factor: float,
    looks: Mapping[str, Look],
) -> None:
    losses = {one.name: one.lost for one in found}
    values = finite([bound for loss in losses.values() for bound in (loss.value, loss.low, loss.high)])
    scale_losses(ax, values or [0.0])
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    unbeaten = sorted((one for one in found if best(one)), key=lambda one: cost(one) or 0.0)
    ax.plot([(cost(one) or 0.0) * factor for one in unbeaten], [losses[one.name].value for one in unbeaten], **FRONTIER)
    for series, look in looks.items():
        mine = sorted((one for one in found if encodable(one.series) == series), key=lambda one: cost(one) or 0.0)
        if not mine:
            continue
        y = [losses[one.name] for one in mine]
        x = [(cost(one) or 0.0) * factor for one in mine]
        middle = [loss.value for loss in y]
        ax.errorbar(x, middle, yerr=bars(y), linewidth=1.7, elinewidth=1.1, capsize=2.5, zorder=3, **line_look(look))
    dress_losses(ax)
    ax.margins(x=0.06)
    ax.xaxis.set_major_locator(FixedLocator(cost_ticks(*ax.get_xlim())))
