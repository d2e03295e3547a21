"""How two runs of one strategy differ that round differently: in what they keep, and in what that costs.

    python results/h200/half.py A.csv B.csv

Both with ``--trace``, over the same tokens. Prints the share of the choices that are the same (of all tokens, layers
and heads, how long each was held), the mean absolute difference of NLLs, and both perplexities.
"""

import sys
from pathlib import Path

import numpy as np

import sinkbench
from sinkbench.results.traces import read_trace, trace_of


def main(one: Path, other: Path) -> None:
    """Compare and print."""
    lives = [read_trace(trace_of(path)).lifetime for path in (one, other)]
    tokens = min(life.shape[-1] for life in lives)
    lives = [np.where(life[..., :tokens] > tokens - np.arange(tokens), 0, life[..., :tokens]) for life in lives]
    frames = [sinkbench.read(path).frame.set_index("input_length")["nll"] for path in (one, other)]
    nlls = [frame[frame.index <= tokens] for frame in frames]
    same = (lives[0] == lives[1]).mean()
    means = [float(nll.mean()) for nll in nlls]
    print(
        f"{tokens:,} tokens: {100 * same:.2f} % of choices alike, mean |dNLL| {(nlls[0] - nlls[1]).abs().mean():.4f}, "
        f"perplexity {np.exp(means[0]):.4f} and {np.exp(means[1]):.4f} ({100 * np.expm1(means[0] - means[1]):+.3f} %)"
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
