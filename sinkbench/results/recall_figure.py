"""The figure of loss by recall distance: a line a run, the intervals as bands, the windows marked."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, NullLocator

from sinkbench.errors import UserError
from sinkbench.results.axes import GREY, INK
from sinkbench.results.files import encodable
from sinkbench.results.looks import Look, looks_of
from sinkbench.results.loss_axes import (
    bars,
    draw_line_legend,
    dress_losses,
    legend_rows,
    line_look,
    scale_losses,
)
from sinkbench.results.loss_scale import finite
from sinkbench.results.recall import BANDS, LEAST, Recalled, RunRecall, drawn_octaves, middle

WINDOW = {"color": GREY, "linestyle": (0, (4.0, 3.0)), "linewidth": 1.2}


def draw_recall(
    found: Sequence[RunRecall], baseline: str, ngram: int, strategies: Mapping[str, str], title: str | None = None
) -> Figure:
    """The figure of ``found``.

    Args:
        found: losses by distance, a run each.
        baseline: the run that they are compared to.
        ngram: tokens of an n-gram.
        strategies: of each run that is shown on the same page.
        title: instead of the usual one; ``\\n`` in two characters is a line break too.

    Raises:
        UserError: there is nothing to draw.
    """
    drawn = {run.name: octaves for run in found if (octaves := drawn_octaves(run))}
    if not drawn:
        raise UserError(f"no run has {LEAST} tokens at any recall distance: the text is too short to show one")
    looks = {encodable(name): look for name, look in looks_of(strategies).items()}
    names = [encodable(name) for name in drawn]
    _, rows = legend_rows([*names, "window"])
    figure = Figure(figsize=(10, 5.2 + 0.2 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    ax = figure.add_subplot()
    _set_axes(ax, list(drawn.values()), [run.never for run in found if run.name in drawn])
    right = float(np.log2(max(octaves[-1].high or 1 for octaves in drawn.values()))) + 0.75
    for run in found:
        if run.name in drawn:
            _draw_run(ax, run, drawn[run.name], looks[encodable(run.name)], len(drawn) <= BANDS, right)
    windows = sorted({run.window for run in found if run.window and run.name in drawn})
    for window in windows:
        ax.axvline(np.log2(window), zorder=1.5, **WINDOW)
    what = "pair" if ngram == 2 else f"{ngram}-gram"
    ax.set_xlabel(f"Tokens back to where the same {what} was last seen", fontsize=11, color=INK)
    ax.set_ylabel(f"NLL above {encodable(baseline)} (nats), lower is better", fontsize=11, color=INK, parse_math=False)
    dress_losses(ax)
    marks = {f"window ({', '.join(f'{window:,}' for window in windows)})": WINDOW} if windows else {}
    draw_line_legend(figure, {name: looks[name] for name in names}, marks)
    lines = (title or "Loss by recall distance").replace("\\n", "\n").split("\n")
    text = "\n".join(textwrap.fill(encodable(line), 90) for line in lines)
    figure.suptitle(text, fontsize=14, color=INK, parse_math=False)
    return figure


def _set_axes(ax: Axes, drawn: Sequence[list[Recalled]], never: Sequence[Recalled]) -> None:
    """Both axes, so that octaves and the tokens never seen before fill them; those stand at the right."""
    shown = [one for octaves in drawn for one in octaves] + [one for one in never if one.tokens >= LEAST]
    # intervals of a few tokens are wide: the lines decide what is shown
    values = [one.loss.value for one in shown if one.loss]
    if len(drawn) <= BANDS:
        many = [one for one in shown if one.tokens >= 4 * LEAST]
        values += [bound for one in many if one.loss for bound in (one.loss.low, one.loss.high)]
    scale_losses(ax, finite(values) or [0.0])
    first = min(int(np.log2(octaves[0].low or 1)) for octaves in drawn)
    last = max(int(np.log2(octaves[-1].high or 2)) for octaves in drawn)
    ax.set_xlim(first, last + 1.25)
    ax.xaxis.set_major_locator(FixedLocator([*range(first, last + 1), last + 0.75]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([*(f"{2**power:,}" for power in range(first, last + 1)), "never\nseen"])


def _draw_run(ax: Axes, run: RunRecall, octaves: Sequence[Recalled], look: Look, band: bool, right: float) -> None:
    x = [middle(octave) for octave in octaves]
    losses = [octave.loss for octave in octaves if octave.loss]
    ax.plot(x, [loss.value for loss in losses], linewidth=1.7, zorder=3, label=run.name, **line_look(look))
    if band:
        bounds = [loss.low for loss in losses], [loss.high for loss in losses]
        ax.fill_between(x, *bounds, color=look.colour, alpha=0.15, linewidth=0, zorder=2)
    never = run.never
    if never.loss and never.tokens >= LEAST:
        error = bars([never.loss]) if band else None
        style = line_look(look) | {"linestyle": "none"}
        ax.errorbar([right], [never.loss.value], yerr=error, elinewidth=1.2, capsize=3, zorder=3, **style)
