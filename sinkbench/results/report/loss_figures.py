"""Figures of losses, for plotly: by recall distance, and beside what they cost."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sinkbench.results.frontier import Budgeted, judged_by_kl
from sinkbench.results.intervals import Interval
from sinkbench.results.looks import Look, looks_of
from sinkbench.results.loss_scale import NEAR, cost_ticks, finite, is_logarithmic, tick_text, ticks
from sinkbench.results.recall import BANDS, LEAST, Recalled, RunRecall, drawn_octaves, middle
from sinkbench.results.report.drawing import AXIS, LAYOUT, PageFigure, plain

FRONTIER = "#8C8C8C"  # as of sinkbench.results.frontier_figure
FITTING = 8  # distances that an axis has room to name
HOVER = "%{customdata[0]:+.4f} nats [%{customdata[1]:+.4f}, %{customdata[2]:+.4f}]"


def recall_figure(found: Sequence[RunRecall], baseline: str, looks: Mapping[str, Look]) -> PageFigure:
    """Loss over recall distance, a line a run, intervals of few runs as bands, the windows marked."""
    losses = [octave.loss for run in found for octave in (*drawn_octaves(run), run.never) if octave.loss]
    band = len(found) <= BANDS
    scale = _Scale([loss.value for loss in losses])
    powers = [int(np.log2(octave.low or 1)) for run in found for octave in drawn_octaves(run)]
    first, right = min(powers), max(powers) + 2.3
    figure = go.Figure(layout=LAYOUT | {"yaxis": scale.axis(f"NLL above {plain(baseline)} (nats)")})
    named = range(first, max(powers) + 2)
    every = 2 if len(named) > FITTING else 1
    figure.layout.xaxis = AXIS | {
        "title": {"text": "tokens back"},
        "range": [first, right + 0.4],
        "tickvals": [*named, right],
        "ticktext": [*(f"{2**power:,}" if not (power - first) % every else "" for power in named), "never"],
        "tickangle": 0,
    }
    _mark_windows(figure, sorted({run.window for run in found if run.window}))
    for run in found:
        octaves = [octave for octave in drawn_octaves(run) if octave.loss]
        x: list[float | None] = [middle(octave) for octave in octaves]
        y: list[Interval | None] = [octave.loss for octave in octaves]
        look = looks[run.name]
        if band:
            _add_band(figure, octaves, scale, look, run.name)
        where = [f"{octave.low:,} to {(octave.high or 0) - 1:,} tokens back" for octave in octaves]
        if run.never.loss and run.never.tokens >= LEAST:  # a point of its own, behind a gap
            x, y, where = [*x, None, right], [*y, None, run.never.loss], [*where, "", "never seen before"]
        figure.add_scatter(**_line(run.name, look, scale, x, y), text=where, hovertemplate="%{text}<br>" + HOVER)
    note = (
        f"NLL minus that of {baseline}, by how many tokens back the same pair of tokens was last seen; lower is better."
        + (" Bands are 95 % intervals." if band else "")
    )
    return PageFigure("Loss by recall distance", note, figure.to_json(), "over the distance to the last occurrence")


def _mark_windows(figure: go.Figure, windows: Sequence[int]) -> None:
    """A line at each window, with its size above."""
    line = {"color": "#777777", "dash": "dash", "width": 1}
    for number, window in enumerate(windows):
        text = {"text": f"{'' if number else 'window '}{window:,}", "xanchor": "left" if number else "right"}
        place = {"showarrow": False, "yref": "paper", "y": 1.0, "yanchor": "bottom"}
        figure.add_vline(x=float(np.log2(window)), line=line, annotation=text | place)


def frontier_figures(found: Sequence[Budgeted], baseline: str) -> list[PageFigure]:
    """Loss over what the cache holds, and over the latency of a step; each where two runs say it."""
    by_kl = judged_by_kl(found, baseline)
    what = "KL to the reference" if by_kl else f"NLL above {plain(baseline)}"
    figures = []
    for heading, label, name, factor, known in (
        ("Loss and cache", "bytes that the cache holds (MiB)", "held", 2.0**-20, "best"),
        ("Loss and latency", "a step, median (ms)", "latency", 1e3, "fastest"),
    ):
        costs = {one.name: getattr(one, name) * factor for one in found if getattr(one, name)}
        if len(costs) < 2:
            continue
        shown = [one for one in found if one.name in costs]
        best = [one for one in shown if getattr(one, known)]
        figure = _frontier(shown, costs, best, label, f"{what} (nats)")
        note = "Further down and to the left is better. Of runs on the frontier, no other costs no more and loses less."
        figures.append(PageFigure(heading, note, figure.to_json(), f"over {label}"))
    return figures


def _frontier(
    shown: Sequence[Budgeted], costs: Mapping[str, float], best: Sequence[Budgeted], label: str, title: str
) -> go.Figure:
    scale = _Scale([one.lost.value for one in shown])
    figure = go.Figure(layout=LAYOUT | {"yaxis": scale.axis(title)})
    low, high = np.log10(min(costs.values())), np.log10(max(costs.values()))
    room = 0.06 * (high - low) or 0.3
    figure.layout.xaxis = AXIS | {
        "title": {"text": label},
        "type": "log",
        "range": [float(low - room), float(high + room)],
        "tickvals": (named := cost_ticks(10 ** (low - room), 10 ** (high + room))),
        "ticktext": [f"{value:,g}" for value in named],
    }
    best = sorted(best, key=lambda one: costs[one.name])
    figure.add_scatter(
        x=[costs[one.name] for one in best],
        y=[scale.at(one.lost.value) for one in best],
        name="frontier",
        mode="lines+markers",
        line={"color": FRONTIER, "width": 9},
        marker={"color": FRONTIER, "size": 18},
        opacity=0.4,
        hoverinfo="skip",
    )
    for series, look in looks_of({one.series: one.strategy for one in shown}).items():
        mine = sorted((one for one in shown if one.series == series), key=lambda one: costs[one.name])
        line = _line(series, look, scale, [costs[one.name] for one in mine], [one.lost for one in mine])
        bars = [(one.lost, scale.at(one.lost.value)) for one in mine]
        line["error_y"] = {
            "symmetric": False,
            "array": [max(0.0, scale.at(loss.high) - y) for loss, y in bars],
            "arrayminus": [max(0.0, y - scale.at(loss.low)) for loss, y in bars],
            "thickness": 1.2,
            "width": 3,
            "color": look.colour,
        }
        names = [plain(one.name) for one in mine]
        figure.add_scatter(**line, text=names, hovertemplate=f"%{{text}}<br>%{{x:.4~g}} {label}<br>{HOVER}")
    return figure


class _Scale:
    """From a loss to a place on the y axis."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values = finite(values) or [0.0]
        self.logarithmic = is_logarithmic(self.values)

    def at(self, value: float) -> float:
        return float(np.arcsinh(value / NEAR)) if self.logarithmic else value

    def axis(self, title: str) -> dict[str, Any]:
        low, high = self.at(min(0.0, *self.values)), self.at(max(0.0, *self.values))
        room = 0.1 * (high - low or 1.0)
        axis = AXIS | {"title": {"text": title}, "range": [low - room, high + room], "zeroline": True}
        if not self.logarithmic:
            return axis | {"tickformat": "+~g"}
        named = ticks(self.values)
        return axis | {"tickvals": [self.at(tick) for tick in named], "ticktext": [tick_text(tick) for tick in named]}


def _line(
    name: str, look: Look, scale: _Scale, x: Sequence[float | None], y: Sequence[Interval | None]
) -> dict[str, Any]:
    """What plotly's lines are made of, the interval of each point to be shown on hovering."""
    return {
        "x": list(x),
        "y": [None if loss is None else scale.at(loss.value) for loss in y],
        "customdata": [[None] * 3 if loss is None else [loss.value, loss.low, loss.high] for loss in y],
        "name": plain(name),
        "legendgroup": name,
        "mode": "lines+markers",
        "marker": {"symbol": look.symbol or "circle", "size": 9 if look.symbol else 6, "color": look.colour},
        "line": {"color": look.colour, "dash": look.dash, "width": 2},
        "connectgaps": False,
    }


def _add_band(figure: go.Figure, octaves: Sequence[Recalled], scale: _Scale, look: Look, name: str) -> None:
    x, y = [middle(octave) for octave in octaves], [octave.loss for octave in octaves if octave.loss]
    figure.add_scatter(
        x=[*x, *reversed(x)],
        y=[*(scale.at(loss.high) for loss in y), *(scale.at(loss.low) for loss in reversed(y))],
        fill="toself",
        mode="none",
        fillcolor=look.colour,
        opacity=0.15,
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
