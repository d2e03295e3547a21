"""Positions: how a key is moved from one position to another.

Rotary embeddings (RoFormer, arXiv 2104.09864) turn pairs of a key's features by ``position * frequency``.
Moving a key by ``d`` positions is one more turn by ``d * frequency``, so a key that a model has already
rotated can be moved without knowing what it was before. Scalings that change the frequencies (linear, llama3,
yarn, longrope) or multiply the result (yarn's and longrope's attention factor) stay valid under such a move.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409): a score gains a term that depends on the key's position.

    Attributes:
        table: the term for positions ``0 .. n - 1`` inside the cache, shape ``(heads, n)``, float32, as the
            model itself would add it to the scaled score (rounded to the model's dtype where the model does so).
    """

    table: Callable[[int], Tensor]
