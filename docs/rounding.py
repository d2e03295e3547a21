"""How far two chunkings of one stream are apart, by the format that keys and values are held in.

    python docs/rounding.py [TOKENS]

On the embedded model, dense attention, chunks of 256 and of 100 tokens, in float32 and in float64; prints a table.
"""

import sys

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.config import RunConfig
from sinkbench.engines.parallel import Parallel
from sinkbench.models.loading import load_model, load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.runs.run import read_text
from sinkbench.strategies.registry import chosen_by


def nlls(model: PreTrainedModel, config: RunConfig, tokens: Tensor, chunk: int) -> np.ndarray:
    """Of all predictions of ``tokens``, with so many a forward."""
    plan = chosen_by(config).plan(layer_sizes(model.config))
    return np.concatenate([steps.nll for steps in Parallel(model, chunk).run(plan, tokens)])


def main(count: int = 500) -> None:
    """A line a format."""
    config = RunConfig(experiment="transformers", dtype="float32", num_tokens=count)
    tokens = read_text(config, lambda: load_tokenizer(locate(config.model))).tokens[0]
    model = load_model(locate(config.model))
    kinds = [config.but(kv_format=name) for name in ("model", "q8_0", "q4_0", "kivi2")]
    found: dict[str, list[float]] = {kind.kv_format: [] for kind in kinds}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)  # in place
        for kind in kinds:
            apart = np.abs(nlls(model, kind, tokens, 256) - nlls(model, kind, tokens, 100))
            found[kind.kv_format] += [apart.mean(), apart.max()]
    print("| | float32: mean | largest | float64: mean | largest |\n|---|--:|--:|--:|--:|")
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{value:.1e}' for value in values)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
