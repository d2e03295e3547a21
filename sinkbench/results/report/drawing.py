"""Figures that answer to hovering and zooming, for plotly."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from sinkbench.results.columns import Drawing, Measure, drawn_measures
from sinkbench.results.curves import DECADES, Curve, curve_of
from sinkbench.results.looks import Look
from sinkbench.results.run import Run
from sinkbench.signals import check

POINTS = 2000  # of a curve: more than a screen shows, and about 20 kB
MARKS = 12  # on a curve
UNSTEADY = 100  # tokens at the beginning that do not decide what the axes show
WIDE = 8  # how much longer than the shortest run the longest is when the axis of tokens is logarithmic
INK, PALE = "#222222", "#E4E4E4"
AXIS = {"gridcolor": PALE, "linecolor": INK, "zeroline": False, "ticks": "outside", "automargin": True}
LAYOUT = {
    "height": 400,
    "margin": {"l": 10, "r": 16, "t": 30, "b": 10},
    "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
    "hovermode": "closest",
    "hoverdistance": 60,
    "hoverlabel": {"namelength": -1, "align": "left"},
    "dragmode": "zoom",
    "font": {"color": INK, "size": 13, "family": "system-ui, sans-serif"},
    "paper_bgcolor": "white",
    "plot_bgcolor": "white",
    "template": "none",
}


@dataclass(frozen=True)
class PageFigure:
    """A figure as plotly's JSON, and what stands around it."""

    heading: str
    note: str
    json: str
    over: str = "over tokens read"


def page_figures(runs: Sequence[Run], looks: Mapping[str, Look]) -> list[PageFigure]:
    """A figure of everything that any of ``runs`` has measured."""
    found = []
    for measure, drawing in drawn_measures():
        check()
        measured = [run for run in runs if measure.column in run.frame and run.frame[measure.column].notna().any()]
        curves = {}
        for run in measured:
            curve = curve_of(run.frame, measure.column, drawing.transform, POINTS, drawing.logarithmic)
            if curve:
                curves[run.name] = curve
        if curves:
            shown = _within_decades(curves) if drawing.logarithmic else curves
            small = [run.name for run in measured if run.name not in shown] if drawing.logarithmic else []
            note = f"{measure.note} Too small to be drawn: {', '.join(small)}." if small else measure.note
            found.append(PageFigure(drawing.heading, note, _figure(measure, drawing, shown, looks).to_json()))
    return found


def _within_decades(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Those of which a part is high enough for a logarithmic axis."""
    top = max(float(y.max()) for _, y in curves.values())
    return {name: (x, y) for name, (x, y) in curves.items() if y.max() > top / 10**DECADES}


def _figure(measure: Measure, drawing: Drawing, curves: Mapping[str, Curve], looks: Mapping[str, Look]) -> go.Figure:
    """All runs in one figure."""
    unit, factor = measure.unit(max(float(y.max()) for _, y in curves.values()))
    curves = {name: (x, y * factor) for name, (x, y) in curves.items()}
    what = drawing.axis or measure.label_within
    label = f"{what} ({unit})" if unit else what
    figure = go.Figure(layout=_layout(label, drawing.from_zero, list(curves.values())))
    if drawing.logarithmic:
        top = max(float(np.log10(y.max())) for _, y in curves.values())
        logs = [(x, np.log10(y).clip(min=top - DECADES)) for x, y in curves.values()]
        figure.update_yaxes(type="log", range=_range(logs, False), exponentformat="power")
    for number, (name, (x, y)) in enumerate(curves.items()):
        look = looks[name]
        under = min(len(curves) - 1 - number, 2)  # wider, so that a curve below another shows
        marks = {"symbol": look.symbol, "size": 9, "maxdisplayed": MARKS, "color": look.colour} if look.symbol else {}
        figure.add_scatter(
            x=x.astype(np.int32),
            y=y.astype(np.float32),
            name=plain(name),
            mode="markers" if len(x) == 1 else "lines+markers" if marks else "lines",
            marker=marks or {"color": look.colour},
            line={"color": look.colour, "dash": look.dash, "width": 1.8 + 0.7 * under},
            hovertemplate=f"%{{y:.5~g}} {label}<br>after %{{x:,}} tokens<extra>%{{fullData.name}}</extra>",
        )
    return figure


def _layout(label: str, from_zero: bool, curves: Sequence[Curve]) -> dict[str, object]:
    ends = [x[-1] for x, _ in curves]
    wide = max(ends) > WIDE * min(ends) and min(ends) > UNSTEADY
    along = AXIS | {"title": {"text": "tokens read" + (" (logarithmic)" if wide else "")}, "tickformat": "~s"}
    first = min(x[0] for x, _ in curves)
    if wide:
        along |= {"type": "log", "range": [float(np.log10(max(first, 10))), float(np.log10(max(ends)))], "dtick": 1}
    else:
        along |= {"range": [0, float(max(ends))]}
    upright = AXIS | {"title": {"text": label}, "range": _range(curves, from_zero)}
    return LAYOUT | {"xaxis": along, "yaxis": upright}


def _range(curves: Sequence[Curve], from_zero: bool) -> list[float]:
    """Where the values lie once they are steady, with room around them."""
    steady = [y[x > UNSTEADY] for x, y in curves]
    values = np.concatenate(steady if any(len(y) for y in steady) else [y for _, y in curves])
    low, high = 0.0 if from_zero else float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return [low if from_zero else low - room, high + room]


def plain(text: str) -> str:
    """``text`` so that plotly shows it as it is: it takes tags and entities in labels for markup."""
    return html.escape(" ".join(text.split()), quote=False)
