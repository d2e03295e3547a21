"""A step the plain way (``--no-cuda-graphs``) under each strategy, of a model with random weights, on one GPU.

    python results/h200/plain.py --window 64
    python results/h200/plain.py --shape mpt-7b --strategies attention_sinks windowed

prints a table: milliseconds a step past a full window, and how many times those of ``attention_sinks`` and of the
seed's loop. All are measured in one process, in turns, as the speed of a processor drifts; each number is the median
over the rounds of the median over a round's steps, and each ratio the median over the rounds of the ratio within one.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from shapes import SHAPES
from shapes import build as build_shape
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkbench.diagnostics.speed import seed_loop
from sinkbench.engines.loss import loss
from sinkbench.engines.predictor import Predictor
from sinkbench.engines.step import Steps
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.exact import exact_angles
from sinkbench.strategies import choose

STRATEGIES = ("attention_sinks", "windowed", "h2o", "tova", "knorm", "keydiff", "random")
Kind = tuple[str, str]
SINKS, SEED = ("attention_sinks", "cache"), ("the seed's loop", "cache")  # ``cache``: their own default


def build(config: str, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the shape that a config.json says, with random weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=dtype).eval()


def timed(predictor: Predictor, tokens: torch.Tensor, steps: range) -> list[float]:
    """Seconds of each step, from token to number."""
    seconds = []
    with predictor.reading():
        for t in steps:
            begin = time.perf_counter()
            loss(predictor.logits(t), tokens[t + 1 : t + 2]).item()  # waits for the device
            seconds.append(time.perf_counter() - begin)
    return seconds


def seed_timed(model: PreTrainedModel, loop: Iterator[Steps], steps: range) -> list[float]:
    """The same of the seed's loop, whose attention is eager."""
    own = model.config._attn_implementation
    if own != "eager":
        model.set_attn_implementation("eager")
    seconds = [next(loop).latency for _ in steps]
    if own != "eager":
        model.set_attn_implementation(own)
    return seconds


@torch.inference_mode()
def measured(
    model: PreTrainedModel, strategies: list[str], window: int, steps: int, rounds: int
) -> dict[Kind, list[float]]:
    """Of the seed's loop and each strategy and its positions, the median seconds of a step in each round."""
    begin = window + 16
    tokens = torch.randint(3, 1000, (begin + rounds * steps + 1,), device=model.device)
    ways: dict[Kind, Callable[[range], list[float]]] = {}
    loop = seed_loop(model, window, 4, tokens.cpu())
    ways[SEED] = lambda some: seed_timed(model, loop, some)
    for positions in ("text", "cache"):
        for name in strategies:
            plan = choose(name, window, positions=positions).plan(layer_sizes(model.config))
            predictor = Predictor(model, plan, tokens)
            ways[name, positions] = lambda some, predictor=predictor: timed(predictor, tokens, some)
    seconds: dict[Kind, list[float]] = {kind: [] for kind in ways}
    with exact_angles(model):
        for way in ways.values():
            way(range(begin))
        for first in range(begin, begin + rounds * steps, steps):
            for kind, way in ways.items():
                seconds[kind].append(median(way(range(first, first + steps))))
    loop.close()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A step the plain way under each strategy.")
    parser.add_argument("--config", default="results/h200/llama_2_7b_shape.json")
    parser.add_argument("--shape", choices=list(SHAPES), help="of shapes.py, in place of --config; on CUDA")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    if asked.shape:
        model = build_shape(*SHAPES[asked.shape])
    else:
        model = build(asked.config, asked.device, getattr(torch, asked.dtype))
    strategies = list(dict.fromkeys(["attention_sinks", *asked.strategies]))
    seconds = measured(model, strategies, asked.window, asked.steps, asked.rounds)
    print("| | positions | a step, ms | times attention_sinks | times the seed's loop |\n|---|---|--:|--:|--:|")
    for (name, positions), mine in seconds.items():
        ratios = [median(a / b for a, b in zip(mine, seconds[other], strict=True)) for other in (SINKS, SEED)]
        print(f"| {name} | {positions} | {1e3 * median(mine):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
