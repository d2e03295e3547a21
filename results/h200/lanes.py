"""What it brings that chunks of what goes by a score are under way at once, on one GPU.

    python results/h200/lanes.py [STRATEGY ...]

prints microseconds a token of the Llama-2-7B shape (random weights, bfloat16, window 1,024, 32,768 random tokens) with
one lane and with those that there are, in turns, the shorter of two times each; and whether all NLLs are the same.
"""

import sys
import time

import torch
from shapes import SHAPES, build
from transformers import PreTrainedModel

from sinkbench.engines import lanes
from sinkbench.engines.parallel import Parallel
from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import choose

TOKENS, WINDOW = 32768, 1024
STRATEGIES = ("h2o", "tova", "knorm", "keydiff", "random")


def timed(model: PreTrainedModel, strategy: str, tokens: torch.Tensor, most: int) -> tuple[float, list[float]]:
    """Seconds, and NLLs, with at most so many lanes."""
    lanes.LANES = most
    begin = time.perf_counter()
    found = Parallel(model).run(choose(strategy, WINDOW).plan(layer_sizes(model.config)), tokens)
    nll = [x for steps in found for x in steps.nll]
    torch.cuda.synchronize()
    return time.perf_counter() - begin, nll


def main(names: list[str]) -> None:
    """Measure and print."""
    model, several = build(*SHAPES["llama-2-7b"]), lanes.LANES
    tokens = torch.randint(3, 1000, (TOKENS + 1,), generator=torch.Generator().manual_seed(0))
    print(f"| us a token | one lane | at most {several} | same NLLs |\n|---|--:|--:|---|")
    for name in names:
        timed(model, name, tokens[: TOKENS // 8], several)
        rounds = [[timed(model, name, tokens, most) for most in (1, several)] for _ in range(2)]
        alone, beside = (1e6 * min(one[i][0] for one in rounds) / TOKENS for i in range(2))
        same = all(nll == rounds[0][0][1] for of_round in rounds for _, nll in of_round)
        print(f"| {name} | {alone:.1f} | {beside:.1f} | {'yes' if same else 'no'} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(STRATEGIES))
