"""A step the plain way (``--no-cuda-graphs``) under each strategy, of a model with random weights, on one GPU.

    python results/h200/plain.py --window 64

prints a table: milliseconds a step past a full window, and how many times those of ``attention_sinks``. All strategies
are measured in one process, in turns, as the speed of a processor drifts; each number is the median over the rounds of
the median over a round's steps, and each ratio the median over the rounds of the ratio within a round.
"""

import argparse
import time
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkbench.engines.head import loss
from sinkbench.engines.predictor import Predictor
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.exact import exact_angles
from sinkbench.strategies import choose

STRATEGIES = ("attention_sinks", "windowed", "h2o", "tova", "knorm", "keydiff", "random")
Kind = tuple[str, str]


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


@torch.inference_mode()
def measured(model: PreTrainedModel, window: int, steps: int, rounds: int) -> dict[Kind, list[float]]:
    """Of each strategy and its positions, the median seconds of a step in each round."""
    begin = window + 16
    tokens = torch.randint(3, 1000, (begin + rounds * steps + 1,), device=model.device)
    kinds = [(name, positions) for positions in ("text", "cache") for name in STRATEGIES]
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    with exact_angles(model):
        predictors = {}
        for name, positions in kinds:
            plan = choose(name, window, positions=positions).plan(layer_sizes(model.config))
            predictors[name, positions] = Predictor(model, plan, tokens)
            timed(predictors[name, positions], tokens, range(begin))
        for turn in range(rounds):
            for kind, predictor in predictors.items():
                first = begin + turn * steps
                seconds[kind].append(median(timed(predictor, tokens, range(first, first + steps))))
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="A step the plain way under each strategy.")
    parser.add_argument("--config", default="results/h200/llama_2_7b_shape.json")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    model = build(asked.config, asked.device, getattr(torch, asked.dtype))
    seconds = measured(model, asked.window, asked.steps, asked.rounds)
    sinks = seconds["attention_sinks", "cache"]  # its own default
    print("| strategy | positions | a step, ms | times attention_sinks |\n|---|---|--:|--:|")
    for (name, positions), mine in seconds.items():
        ratio = median(a / b for a, b in zip(mine, sinks, strict=True))
        print(f"| `{name}` | {positions} | {1e3 * median(mine):.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
