"""What is shown: perplexity, memory and latency of several runs over the length of the input.

Colour says which strategy, line style says which feature.
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sinkbench.errors import UserError
from sinkbench.results.columns import FEATURES, Feature

Results: TypeAlias = Mapping[str, pd.DataFrame]
Curve: TypeAlias = tuple[np.ndarray, np.ndarray]

# Okabe and Ito's colours, which colour-blind people can tell apart: a strategy looks the same in every figure
COLOURS = {"transformers": "#D55E00", "windowed": "#009E73", "attention_sinks": "#0072B2", "recompute": "#CC79A7"}
OTHER_COLOURS = ("#E69F00", "#56B4E9", "#000000", "#7F7F7F")

FORMATS = ("png", "svg", "pdf")
MANY, ENOUGH = 20_000, 4_000  # a curve of more points than MANY is thinned to ENOUGH
DASHES = {"--": (4.0, 4.0), ":": (1.0, 1.6)}  # line and gap, in line widths
INK, GREY, PALE = "#222222", "#555555", "#DDDDDD"
GAP = 10.0  # points between two axes on the right


def draw(
    results: Results,
    features: Sequence[str],
    title: str | None = None,
    log_perplexity_limit: float = 5.0,
    skip_first: int = 100,
) -> Figure:
    """The figure of ``results``, the first feature on the left axis and each further one on a right axis of its own.

    Args:
        results: rows by experiment name.
        features: keys of :data:`FEATURES`.
        title: instead of the usual one; ``\\n`` in two characters is a line break too.
        log_perplexity_limit: the highest log perplexity shown; 0 for no limit.
        skip_first: rows of each run not to draw. A run that has no more is left out.

    Raises:
        UserError: an unknown feature, or nothing to draw.
    """
    kept = _kept(results, skip_first)
    chosen = [_available(kept, name) for name in checked(features)]
    colours = colours_of(list(results))
    figure = Figure(
        figsize=(10, 5.4 + 0.2 * max(len(kept), len(chosen))), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    )
    axes = [figure.add_subplot()]
    axes += [axes[0].twinx() for _ in chosen[1:]]
    drawn: set[str] = set()
    for ax, feature in zip(axes, chosen, strict=True):
        curves, unit = _curves(kept, feature)
        _limits(ax, curves, log_perplexity_limit if feature.limited else 0.0)
        for number, (name, curve) in enumerate(curves.items()):
            _line(ax, curve, f"{name} {feature.label}", colours[name], feature.style, phase=number / len(curves))
        drawn |= set(curves)
        ax.set_ylabel(
            f"{feature.label}{f' ({unit})' if unit else ''}, lower is better", fontsize=11, color=INK, labelpad=7
        )
    for number, ax in enumerate(axes):
        _dress(ax, first=number == 0)
    _space_axes(figure, axes)
    _legend(figure, {name: colours[name] for name in kept if name in drawn}, chosen)
    figure.suptitle(_title(title, chosen), fontsize=14, color=INK, parse_math=False)
    return figure


def checked(features: Sequence[str]) -> list[str]:
    """``features`` without repetition.

    Raises:
        UserError: none, or one that does not exist.
    """
    unknown = [name for name in features if name not in FEATURES]
    if unknown or not features:
        wrong = f"unknown feature {', '.join(unknown)}" if unknown else "no feature"
        raise UserError(f"{wrong}: --features takes one or more of {', '.join(FEATURES)}")
    return list(dict.fromkeys(features))


def left_out(results: Results, features: Sequence[str], skip_first: int) -> list[str]:
    """What :func:`draw` does not show of ``results``, one line each."""
    kept = _kept(results, skip_first)
    notes = [
        f"{name} is not shown: its {len(frame)} rows are all within --skip-first {skip_first}"
        for name, frame in results.items()
        if name not in kept
    ]
    for feature in (_available(kept, name) for name in checked(features)):
        for name, frame in kept.items():
            if frame[feature.column].isna().all():
                notes.append(f"{name} has no line for {feature.label}: its rows have no {feature.column}")
    return notes


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each experiment.

    Raises:
        UserError: more unknown names than there are colours to tell them apart.
    """
    others = sorted(set(names) - set(COLOURS))
    if len(others) > len(OTHER_COLOURS):
        raise UserError(
            f"{len(others)} results of other names than {', '.join(COLOURS)} ({', '.join(others)}): no more than "
            f"{len(OTHER_COLOURS)} can be told apart in one figure; move some to another folder"
        )
    return COLOURS | dict(zip(others, OTHER_COLOURS, strict=False))


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as png, svg or pdf, by the suffix of ``path``; the same figure gives the same bytes.

    Raises:
        UserError: another suffix, or ``path`` cannot be written.
    """
    form = check_format(path)
    buffer = BytesIO()
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context({"svg.hashsalt": "sinkbench"}):
        figure.savefig(buffer, format=form, dpi=150, metadata=undated)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; give another --output") from error


def check_format(path: Path) -> str:
    """The format that the suffix of ``path`` asks for.

    Raises:
        UserError: none that can be written.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"cannot tell the format of {path}: --output must end in .{', .'.join(FORMATS)}")
    return form


def _kept(results: Results, skip_first: int) -> dict[str, pd.DataFrame]:
    """The runs that have rows behind the first ``skip_first``, without those."""
    if skip_first < 0:
        raise UserError(f"--skip-first is {skip_first}: give 0 or more")
    kept = {name: frame.iloc[skip_first:] for name, frame in results.items() if len(frame) > skip_first}
    if not kept:
        longest = max(map(len, results.values()), default=0)
        raise UserError(f"no run is longer than --skip-first {skip_first} (the longest has {longest} rows): give less")
    return kept


def _available(results: Results, name: str) -> Feature:
    """The feature, or what is drawn in its place where no run has it."""
    feature: Feature | None = FEATURES[name]
    while feature is not None:
        if any(frame[feature.column].notna().any() for frame in results.values()):
            return feature
        feature = feature.otherwise
    raise UserError(f"no run has {FEATURES[name].label}: {FEATURES[name].missing}")


def _curves(results: Results, feature: Feature) -> tuple[dict[str, Curve], str]:
    """What to draw of each run that has the feature, and its unit."""
    curves: dict[str, Curve] = {}
    for name, frame in results.items():
        values = feature.transform(frame[feature.column].dropna())
        values = values[np.isfinite(values)]
        if len(values):
            curves[name] = _thinned(frame["input_length"][values.index].to_numpy(), values.to_numpy())
    largest = max((y.max() for _, y in curves.values()), default=1.0)
    unit, factor = next((u for u in feature.units if largest * u[1] >= 1), feature.units[-1])
    return {name: (x, y * factor) for name, (x, y) in curves.items()}, unit


def _thinned(x: np.ndarray, y: np.ndarray) -> Curve:
    """Of a long curve, its ends and the lowest and highest point of each stretch."""
    if len(y) <= MANY:
        return x, y
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), ENOUGH // 2):
        kept |= {int(stretch[y[stretch].argmin()]), int(stretch[y[stretch].argmax()])}
    chosen = sorted(kept)
    return x[chosen], y[chosen]


def _limits(ax: Axes, curves: Mapping[str, Curve], limit: float) -> float:
    """Set the bounds of the y axis so that what lies under ``limit`` fills it; returns the upper one."""
    low = min((float(y.min()) for _, y in curves.values()), default=0.0)
    high = max((float(y.max()) for _, y in curves.values()), default=1.0)
    if limit and not low < limit:
        raise UserError(f"every log perplexity is above --log-perplexity-limit {limit:g} (least: {low:.2f}): give more")
    top = high + 0.05 * max(high - low, 0.1 * abs(high), 1e-9)
    top = min(top, limit) if limit else top
    ax.set_ylim(low - 0.05 * max(top - low, 0.1 * abs(low)), top)
    return top


def _line(ax: Axes, curve: Curve, label: str, colour: str, style: str, *, phase: float) -> None:
    """One run; an arrowhead marks where it leaves through the top for good."""
    x, y = curve
    top = ax.get_ylim()[1]
    # where runs coincide, the shorter lies on the longer, and dashes of the one fill the gaps of the other
    above = 2 + 1 / (1 + float(x[-1]))
    dashes = DASHES.get(style)
    look = (phase * sum(dashes), dashes) if dashes else style
    width = 2.2 if style == ":" else 1.7
    marker = "o" if len(x) == 1 else ""
    ax.plot(x, y, color=colour, linestyle=look, linewidth=width, marker=marker, label=label, zorder=above)
    if y[-1] > top:
        under = np.flatnonzero(y <= top)
        leaves = x[0]
        if len(under):
            last = int(under[-1])
            leaves = np.interp(top, y[last : last + 2], x[last : last + 2])
        ax.plot(
            [leaves], [top], marker="^", markersize=8, color=colour, clip_on=False, zorder=4, label=f"_{label} leaves"
        )


def _dress(ax: Axes, first: bool) -> None:
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


def _space_axes(figure: Figure, axes: Sequence[Axes]) -> None:
    """Move each right axis beyond the labels of the one before."""
    for inner, outer in pairwise(axes[1:]):
        figure.draw_without_rendering()
        reach = inner.yaxis.label.get_window_extent().x1 - inner.bbox.x1
        outer.spines["right"].set_position(("outward", reach * 72 / figure.dpi + GAP))


def _legend(figure: Figure, colours: Mapping[str, str], features: Sequence[Feature]) -> None:
    """Below the axes: which colour is which strategy, which line is which feature."""
    places = ("left axis", "right axis", "outer right axis")
    groups = [
        ("Strategy (colour)", [(name, {"color": colour, "linewidth": 5.0}) for name, colour in colours.items()]),
        (
            "Feature (line)",
            [
                (f"{feature.label}, {place}", {"color": GREY, "linewidth": 2.0, "linestyle": feature.style})
                for feature, place in zip(features, places, strict=False)
            ],
        ),
    ]
    rows = max(len(entries) for _, entries in groups)
    handles, labels = [], []
    for heading, entries in groups:
        filler = [(" ", {"linestyle": "none"})] * (rows - len(entries))
        for label, look in [(heading, {"linestyle": "none"}), *entries, *filler]:
            handles.append(Line2D([], [], **look))  # type: ignore[arg-type]
            labels.append(label)
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_color(INK)
        text.set_fontweight("bold" if text.get_text() in dict(groups) else "normal")


def _title(title: str | None, features: Sequence[Feature]) -> str:
    """``title`` with its line breaks, or one that names the features."""
    if not title:
        names = [name if name[1].isupper() else name[0].lower() + name[1:] for name in (f.label for f in features)]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        title = f"{listed[0].upper()}{listed[1:]} as a function of input length"
    lines = title.replace("\\n", "\n").split("\n")
    return "\n".join(textwrap.fill(line, 90) for line in lines)
