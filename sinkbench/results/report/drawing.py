"""Figures that answer to hovering and zooming, for plotly."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from sinkbench.results.columns import Values, averaged, log, mebibytes, smoothed, unchanged
from sinkbench.results.figures import COLOURS, OTHER_COLOURS
from sinkbench.results.report.collect import Run

POINTS = 2000  # of a curve: more than a screen shows, and about 20 kB
UNSTEADY = 100  # tokens at the beginning that do not decide what the axes show
WIDE = 8  # how much longer than the shortest run the longest is when the axis of tokens is logarithmic
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INK, PALE = "#222222", "#E4E4E4"


@dataclass(frozen=True)
class Drawn:
    """Something to draw over the input length.

    Attributes:
        column: of the result files.
        heading: above the figure.
        label: of the axis, with the unit; the hover label names it too.
        note: how the curve comes from the column.
        transform: the way from the column to the curve.
        factor: from the transformed column to the unit.
        from_zero: whether the axis begins at 0.
    """

    column: str
    heading: str
    label: str
    note: str
    transform: Callable[[Values], Values] = unchanged
    factor: float = 1.0
    from_zero: bool = False


DRAWN = (
    Drawn("overall_ppl", "Perplexity", "log perplexity (nats)", "Mean NLL of all tokens so far; lower is better.", log),
    Drawn(
        "kv_cache_bytes", "KV cache", "KV cache (MiB)", "Keys and values held after a token.", mebibytes, from_zero=True
    ),
    Drawn("cuda_vram_allocated", "CUDA memory", "allocated (GiB)", "By torch, on all visible devices."),
    Drawn("latency", "Latency", "time a token (ms)", "Rolling median of the steps.", smoothed, 1e3, True),
    Drawn("fresh_nll", "Fluency", "NLL (nats)", "With fresh context, mean of 256 tokens; lower is better.", averaged),
    Drawn("repetition", "Repetition", "repeated 4-grams (%)", "Of the text so far.", factor=100.0, from_zero=True),
    Drawn("non_word", "Non-words", "non-words (%)", "Of the text so far.", factor=100.0, from_zero=True),
)


@dataclass(frozen=True)
class Look:
    """How a run is drawn: the colour says which strategy, dashes which of its runs."""

    colour: str
    dash: str


@dataclass(frozen=True)
class Figure:
    """A figure as plotly's JSON, and what stands around it."""

    heading: str
    note: str
    json: str


def looks(runs: Sequence[Run], strategies: Sequence[str]) -> dict[str, Look]:
    """A look for each run, where ``strategies`` are all that the page shows."""
    others = sorted(set(strategies) - set(COLOURS))
    colours = COLOURS | {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    seen: dict[str, int] = {}
    found = {}
    for run in runs:
        number = seen[run.strategy] = seen.get(run.strategy, -1) + 1
        found[run.name] = Look(colours[run.strategy], DASHES[number % len(DASHES)])
    return found


def figures(runs: Sequence[Run], looked: dict[str, Look]) -> list[Figure]:
    """A figure of everything that any of ``runs`` has measured."""
    found = []
    for drawn in DRAWN:
        curves = {run.name: curve for run in runs if (curve := _curve(run, drawn)) is not None}
        if curves:
            found.append(Figure(drawn.heading, drawn.note, _figure(drawn, curves, looked).to_json()))
    return found


def _curve(run: Run, drawn: Drawn) -> np.ndarray | None:
    """Tokens and values, shape ``(2, n)``; ``None`` where there is nothing to draw."""
    values = drawn.transform(run.frame[drawn.column].dropna()) * drawn.factor
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return _thinned(np.stack([run.frame["input_length"][values.index].to_numpy(), values.to_numpy()]))


def _thinned(curve: np.ndarray) -> np.ndarray:
    """Of a long curve, its ends and the lowest and highest point of each stretch."""
    length = curve.shape[1]
    if length <= POINTS:
        return curve
    kept = {0, length - 1}
    for stretch in np.array_split(np.arange(length), POINTS // 2):
        y = curve[1, stretch]
        kept |= {int(stretch[y.argmin()]), int(stretch[y.argmax()])}
    return curve[:, sorted(kept)]


def _figure(drawn: Drawn, curves: dict[str, np.ndarray], looked: dict[str, Look]) -> go.Figure:
    """All runs in one figure."""
    figure = go.Figure(layout=_layout(drawn, list(curves.values())))
    for number, (name, (x, y)) in enumerate(curves.items()):
        look = looked[name]
        under = min(len(curves) - 1 - number, 2)  # wider, so that a curve below another shows
        figure.add_scatter(
            x=x.astype(np.int32),
            y=y.astype(np.float32),
            name=plain(name),
            mode="lines" if len(x) > 1 else "markers",
            line={"color": look.colour, "dash": look.dash, "width": 1.8 + 0.7 * under},
            hovertemplate=f"%{{y:.5~g}} {drawn.label}<br>after %{{x:,}} tokens<extra>%{{fullData.name}}</extra>",
        )
    return figure


def _layout(drawn: Drawn, curves: list[np.ndarray]) -> dict[str, object]:
    ends = [curve[0, -1] for curve in curves]
    wide = max(ends) > WIDE * min(ends) and min(ends) > UNSTEADY
    axis = {"gridcolor": PALE, "linecolor": INK, "zeroline": False, "ticks": "outside", "automargin": True}
    along = axis | {"title": {"text": "tokens read" + (" (logarithmic)" if wide else "")}, "tickformat": "~s"}
    first = min(curve[0, 0] for curve in curves)
    if wide:
        along |= {"type": "log", "range": [float(np.log10(max(first, 10))), float(np.log10(max(ends)))], "dtick": 1}
    else:
        along |= {"range": [0, float(max(ends))]}
    return {
        "xaxis": along,
        "yaxis": axis | {"title": {"text": drawn.label}, "range": _range(curves, drawn.from_zero)},
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


def _range(curves: list[np.ndarray], from_zero: bool) -> list[float]:
    """Where the values lie once they are steady, with room around them."""
    steady = [curve[1, curve[0] > UNSTEADY] for curve in curves]
    values = np.concatenate(steady if any(len(y) for y in steady) else [curve[1] for curve in curves])
    low, high = 0.0 if from_zero else float(values.min()), float(values.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return [low if from_zero else low - room, high + room]


def plain(text: str) -> str:
    """``text`` so that plotly shows it as it is: it takes tags and entities in labels for markup."""
    return html.escape(" ".join(text.split()), quote=False)
