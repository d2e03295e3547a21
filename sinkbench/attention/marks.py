"""Numbers by which equal keys are known: a key as words of bits, each times a factor of its place."""

import torch
from torch import Tensor

FACTOR = 0x1E3779B97F4A7C15


def marks_of(keys: Tensor) -> Tensor:
    """A number for each key, ``(R, m)``, int64: equal where all bits are, and by no likely chance otherwise."""
    words = words_of(keys)
    factors = torch.arange(1, words.shape[-1] + 1, device=keys.device) * FACTOR | 1
    return (words * factors).sum(-1)


def words_of(keys: Tensor) -> Tensor:
    """The bits of ``(R, m, D)`` keys as integers; in long words where there are whole ones.

    Marks of few small sums would soon be equal.
    """
    size = keys.element_size()
    whole = keys.shape[-1] * size % 8 == 0
    return keys.contiguous().view(torch.int64 if whole else {2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
