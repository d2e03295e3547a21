"""Measures both engines on the embedded model in one process: agreement token by token, and speed.

    python docs/engines.py

writes ``docs/agreement.png`` and prints the figures that ``docs/parallel.md`` quotes.
"""

import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from matplotlib.figure import Figure

from sinkbench.config import ModelSource, Source
from sinkbench.data.stream import read_stream
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.models.loading import load_model, load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import choose

AGREEMENT_TOKENS, SPEED_TOKENS, STEPS, CHUNK = 2000, 8192, 300, 2048


def main() -> None:
    """Measure, print, draw."""
    checkpoint = locate(ModelSource("smollm2-135m", dtype="float32"))
    model = load_model(checkpoint)
    sizes = layer_sizes(model.config)
    tokens = read_stream(Source("kjv"), SPEED_TOKENS + 1, lambda: load_tokenizer(checkpoint)).tokens
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="token", ylabel="|ΔNLL| between the engines (nats)", yscale="log")
    for strategy, colour in (("windowed", "#009E73"), ("attention_sinks", "#0072B2")):
        plan = choose(strategy, 256).plan(sizes)
        one, many = (
            np.array([value for steps in engine.run(plan, tokens[: AGREEMENT_TOKENS + 1]) for value in steps.nll])
            for engine in (Stepwise(model), Parallel(model))
        )
        difference = np.abs(one - many)
        print(f"{strategy}, window 256: max |ΔNLL| {difference.max():.1e}, mean {difference.mean():.1e}")
        axes.plot(difference + 1e-8, ".", color=colour, markersize=2, label=strategy)
    axes.axvline(256, color="grey", linewidth=1, linestyle="--")
    axes.legend(loc="lower right")
    figure.savefig(Path(__file__).with_name("agreement.png"), dpi=150)
    plan = choose("attention_sinks", 1024).plan(sizes)
    begin = time.perf_counter()
    count = sum(len(steps.nll) for steps in Parallel(model, CHUNK).run(plan, tokens))
    ours = (time.perf_counter() - begin) / count
    begin = time.perf_counter()
    with torch.inference_mode():
        for part in tokens[:-1].split(CHUNK):
            model(part[None], use_cache=False)
    plain = (time.perf_counter() - begin) / count
    step = median(s.latency for s, _ in zip(Stepwise(model).run(plan, tokens), range(1024 + STEPS), strict=False))
    print(f"parallel {ours * 1e3:.2f} ms a token, stepwise {step * 1e3:.1f} ms a token: {step / ours:.1f} times")
    print(f"a plain dense forward of {CHUNK} tokens, logits included: {plain * 1e3:.2f} ms a token")
    print(f"parallel takes {ours / plain:.2f} times as long as that")


if __name__ == "__main__":
    main()
