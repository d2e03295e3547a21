"""Figures of several runs over the length of the input: perplexity, memory, latency, and whatever else is measured.

Colour and marks say which run, the style of a line which feature.
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from sinkbench.errors import UserError
from sinkbench.files import check_output
from sinkbench.results.axes import (
    INK,
    coinciding,
    draw_legend,
    draw_run,
    dress,
    legend_shape,
    set_limits,
    set_logarithmic,
    space_axes,
)
from sinkbench.results.columns import MEASURES, OWN_FIGURES, Drawing, Measure, features
from sinkbench.results.curves import Curve, curve_of
from sinkbench.results.documents import by_length
from sinkbench.results.files import encodable, replace_file
from sinkbench.results.looks import looks_of
from sinkbench.results.run import strategy_of

Results: TypeAlias = Mapping[str, pd.DataFrame]

FORMATS = ("png", "svg", "pdf")
POINTS = 4_000  # of a curve
LINES = ("-", "--", ":", "-.", "-..", "--.")  # styles of lines, the better ones first


@dataclass(frozen=True)
class Shown:
    """A feature as it is drawn.

    Attributes:
        line: the style of its lines.
        instead: why it is drawn in place of another; empty where it is not.
    """

    measure: Measure
    drawing: Drawing
    line: str = "-"
    instead: str = ""


def draw(
    results: Results,
    chosen: Sequence[str],
    title: str | None = None,
    log_perplexity_limit: float = 5.0,
    skip_first: int = 100,
    strategies: Mapping[str, str] | None = None,
) -> Figure:
    """The figure of ``results``, the first feature on the left axis and each further one on a right axis of its own.

    Args:
        results: rows by run.
        chosen: features, by the names that :func:`sinkbench.results.columns.features` has.
        title: instead of the usual one; ``\\n`` in two characters is a line break too.
        log_perplexity_limit: the highest log perplexity shown; 0 for no limit.
        skip_first: rows of each run not to draw. A run that has no more is left out.
        strategies: of each run; by default as its name says.

    Raises:
        UserError: an unknown feature, or nothing to draw.
    """
    looks = looks_of({encodable(name): (strategies or {}).get(name) or strategy_of(name) for name in results})
    kept = _kept({encodable(name): frame for name, frame in results.items()}, skip_first)
    shown = _shown(kept, checked(chosen))
    curves = [_curves(kept, feature) for feature in shown]
    names = [name for name in kept if any(name in of_feature for of_feature, _ in curves)]
    _, rows = legend_shape(names, [feature.measure.label for feature in shown])
    figure = Figure(figsize=(10, 5.4 + 0.2 * rows), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    axes = [figure.add_subplot()]
    axes += [axes[0].twinx() for _ in shown[1:]]
    for ax, feature, (of_feature, unit) in zip(axes, shown, curves, strict=True):
        if feature.drawing.logarithmic:
            groups = set_logarithmic(ax, of_feature)
        else:
            set_limits(ax, of_feature, log_perplexity_limit if feature.drawing.limited else 0.0)
            groups = coinciding(of_feature, ax.get_ylim())
        for name, curve in of_feature.items():
            label = f"{name} {feature.measure.label}"
            draw_run(ax, curve, label, looks[name], feature.line, groups[name], names.index(name) / len(names))
        ax.set_ylabel(_axis_label(feature, unit), fontsize=11, color=INK, labelpad=7)
    for number, ax in enumerate(axes):
        dress(ax, first=number == 0)
    space_axes(figure, axes)
    entries = [(feature.measure.label, feature.line) for feature in shown]
    draw_legend(figure, {name: looks[name] for name in names}, entries)
    figure.suptitle(encodable(_title(title, shown)), fontsize=14, color=INK, parse_math=False)
    return figure


def checked(chosen: Sequence[str]) -> list[str]:
    """The names of features without repetition.

    Raises:
        UserError: none, or one that does not exist.
    """
    known = features()
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        wrong = f"unknown feature {', '.join(unknown)}" if unknown else "no feature"
        raise UserError(f"{wrong}: --features takes one or more of {', '.join([*known, *OWN_FIGURES])}")
    return list(dict.fromkeys(chosen))


def left_out(results: Results, chosen: Sequence[str], skip_first: int) -> list[str]:
    """What :func:`draw` does not show of ``results``, one line each."""
    kept = _kept(results, skip_first)
    notes = [
        f"{name} is not shown: its {len(frame)} rows are all within --skip-first {skip_first}"
        for name, frame in results.items()
        if name not in kept
    ]
    wrong = {name: int((~np.isfinite(frame["nll"])).sum()) for name, frame in kept.items()}
    notes += [
        f"{name} is not shown whole: {count:,} of its {len(kept[name]):,} NLLs are no numbers"
        for name, count in wrong.items()
        if count
    ]
    for measure in (feature.measure for feature in _shown(kept, checked(chosen))):
        for name, frame in kept.items():
            if not _has(frame, measure):
                notes.append(f"{name} has no line for {measure.label}: its rows have no {measure.column}")
    return notes


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
    replace_file(path, buffer.getvalue(), folder=True, advice="; give another --output")


def check_format(path: Path) -> str:
    """The format that the suffix of ``path`` asks for.

    Raises:
        UserError: none that can be written, or what is at ``path`` is no file.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise UserError(f"cannot tell the format of {path}: --output must end in .{', .'.join(FORMATS)}")
    check_output(path)
    return form


def _kept(results: Results, skip_first: int) -> dict[str, pd.DataFrame]:
    """The runs that have rows behind the first ``skip_first``, without those."""
    if skip_first < 0:
        raise UserError(f"--skip-first is {skip_first}: give 0 or more")
    results = {name: by_length(frame) for name, frame in results.items()}
    kept = {name: frame.iloc[skip_first:] for name, frame in results.items() if len(frame) > skip_first}
    if not kept:
        longest = max(map(len, results.values()), default=0)
        raise UserError(f"no run is longer than --skip-first {skip_first} (the longest has {longest} rows): give less")
    return kept


def _has(frame: pd.DataFrame, measure: Measure) -> bool:
    return measure.column in frame and bool(frame[measure.column].notna().any())


def _shown(results: Results, chosen: Sequence[str]) -> list[Shown]:
    """The features, each with a style of line that no other has, as far as there are styles."""
    shown: list[Shown] = []
    for name in chosen:
        measure, drawing, instead = _available(results, name)
        taken = {feature.line for feature in shown}
        line = next((line for line in (drawing.line, *LINES) if line not in taken), drawing.line)
        shown.append(Shown(measure, drawing, line, instead))
    return shown


def _available(results: Results, name: str) -> tuple[Measure, Drawing, str]:
    """What is drawn for the feature ``name``: its measure, or a substitute where no run has that, and then why."""
    asked = measure = features()[name]
    instead = ""
    while measure.drawing:
        if any(_has(frame, measure) for frame in results.values()):
            return measure, measure.drawing, instead
        if not measure.drawing.substitute:
            break
        column, instead = measure.drawing.substitute
        measure = MEASURES[column]
    raise UserError(f"no run has {asked.label}: {asked.drawing.missing if asked.drawing else ''}")


def _curves(results: Results, feature: Shown) -> tuple[dict[str, Curve], str]:
    """What to draw of each run that has the feature, and its unit."""
    curves: dict[str, Curve] = {}
    for name, frame in results.items():
        if _has(frame, feature.measure):
            curve = curve_of(
                frame, feature.measure.column, feature.drawing.transform, POINTS, feature.drawing.logarithmic
            )
            if curve:
                curves[name] = curve
    unit, factor = feature.measure.unit(max((y.max() for _, y in curves.values()), default=1.0))
    return {name: (x, y * factor) for name, (x, y) in curves.items()}, unit


def _axis_label(feature: Shown, unit: str) -> str:
    within = "; ".join(filter(None, (unit, feature.instead)))
    better = f", {feature.measure.better} is better" if feature.measure.better else ""
    return f"{feature.measure.label}{f' ({within})' if within else ''}{better}"


def _title(title: str | None, shown: Sequence[Shown]) -> str:
    """``title`` with its line breaks, or one that names the features."""
    if not title:
        names = [feature.measure.label_within for feature in shown]
        listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        title = f"{listed[0].upper()}{listed[1:]} as a function of input length"
    lines = title.replace("\\n", "\n").split("\n")
    return "\n".join(textwrap.fill(line, 90) for line in lines)
