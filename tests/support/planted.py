"""A text in which passages are repeated at known distances: what must be remembered for how long."""

import json
from pathlib import Path

import numpy as np


def planted_tokens(
    source: np.ndarray, length: int, near: int = 6, far: int = 14, passage: int = 24, seed: int = 0
) -> np.ndarray:
    """Tokens of which passages are copies of what stood 2^``near`` to 2^``far`` tokens before; int64.

    Distances are drawn so that every octave has as many. Between them stand ``source``'s own tokens, shuffled, so that
    a copy can be told from its first occurrence alone.

    Args:
        source: tokens to draw from, shape ``(n,)``.
        length: of the text.
        near: of the least distance, a power of two.
        far: of the largest.
        passage: tokens of a copy.
        seed: of the draws.
    """
    draw = np.random.default_rng(seed)
    tokens = draw.choice(np.unique(source), length)
    place = 2**far // 8
    while place + passage < length:
        distance = int(2 ** draw.uniform(near, min(far, np.log2(place))))
        if distance >= passage:
            start = place - distance
            tokens[place : place + passage] = tokens[start : start + passage]
        place += 2 * passage
    return tokens


def saved_tokens(tokens: np.ndarray, path: Path) -> Path:
    """``tokens`` as a data set for ``sinkbench run``: one row, column ``input_ids``."""
    path.write_text(json.dumps({"input_ids": tokens.tolist()}) + "\n")
    return path
