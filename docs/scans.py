"""Measures strategies that score their entries, on the embedded model in one process: agreement and cost.

    python docs/scans.py

writes ``docs/scans.png`` and prints the table that ``docs/parallel.md`` quotes. Ten minutes on two cores.
"""

import time
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
from matplotlib.figure import Figure

from sinkbench.attention import patterns
from sinkbench.cache.trace import Trace
from sinkbench.config import ModelSource, Source
from sinkbench.data.stream import read_stream
from sinkbench.engines.base import Engine
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.models.loading import load_model, load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import Plan, choose

NAMES = ("h2o", "tova", "knorm", "keydiff", "random")
COMPARED, WINDOW = 400, 1024  # tokens under a window of 128; entries held while time is taken
BEGIN, END, STEPS = 1280, 2304, 40  # tokens whose chunks are timed, behind a full window; steps that are


def main() -> None:
    """Measure, print, draw."""
    checkpoint = locate(ModelSource("smollm2-135m", dtype="float32"))
    model = load_model(checkpoint)
    sizes = layer_sizes(model.config)
    tokens = read_stream(Source("kjv"), END + 1, lambda: load_tokenizer(checkpoint)).tokens
    ways = {"token by token": Stepwise(model), "in chunks, torch": Parallel(model), "in chunks, numba": Parallel(model)}
    costs: dict[str, list[float]] = {way: [] for way in ways}
    for name in NAMES:
        small, plan = choose(name, 128).plan(sizes), choose(name, WINDOW).plan(sizes)
        one, many = (
            _read(engine, small, tokens[: COMPARED + 1]) for engine in (ways["token by token"], Parallel(model))
        )
        difference, same = np.abs(one[0] - many[0]), (one[1] == many[1]).mean()
        print(f"{name}: max |ΔNLL| {difference.max():.1e}, mean {difference.mean():.1e}, lifetimes equal {same:.2%}")
        for way, engine in ways.items():
            with patch.object(patterns, "kernels_for", _none if way.endswith("torch") else patterns.kernels_for):
                costs[way].append(1e3 * _seconds(engine, plan, tokens))
        step, torch, fast = (costs[way][-1] for way in ways)
        print(
            f"  {step:.1f} ms a token, in chunks {fast:.2f} ({step / fast:.1f} times), without numba {torch:.2f}",
            flush=True,
        )
    _draw(costs)


def _none(device: object) -> None:
    return None


def _read(engine: Engine, plan: Plan, tokens) -> tuple[np.ndarray, np.ndarray]:  # noqa: ANN001
    """NLLs, and how long each token was held in each layer and head."""
    trace = Trace(plan)
    nll = [value for steps in engine.run(plan, tokens, 0, trace) for value in steps.nll]
    return np.array(nll), trace.lifetimes("", len(nll)).lifetime


def _seconds(engine: Engine, plan: Plan, tokens) -> float:  # noqa: ANN001
    """Seconds a token, behind a full window."""
    if isinstance(engine, Stepwise):
        return median(s.latency for s in islice(engine.run(plan, tokens), WINDOW + 1, WINDOW + 1 + STEPS))
    begin = None
    for steps in engine.run(plan, tokens):
        if begin is None and steps.first + len(steps.nll) > BEGIN:
            begin, first = time.perf_counter(), steps.first + len(steps.nll)
    return (time.perf_counter() - begin) / (END - first)


def _draw(costs: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(ylabel="ms a token", yscale="log")
    places = np.arange(len(NAMES))
    for number, ((way, values), colour) in enumerate(
        zip(costs.items(), ("#999999", "#56B4E9", "#0072B2"), strict=True)
    ):
        bars = axes.bar(places + 0.27 * (number - 1), values, 0.25, color=colour, label=way)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], fontsize=8)
    axes.set_xticks(places, NAMES)
    axes.set_yticks((2, 5, 10, 20, 50, 100), ("2", "5", "10", "20", "50", "100"))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    figure.savefig(Path(__file__).with_name("scans.png"), dpi=150)


if __name__ == "__main__":
    main()
