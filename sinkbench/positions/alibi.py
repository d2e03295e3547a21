"""Attention with linear biases (ALiBi, arXiv 2108.12409)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LOOKED_AT = 1024  # positions of which half precision rounds most terms


@dataclass(frozen=True)
class Alibi:
    """A score gains a term that grows linearly with the key's position.

    Attributes:
        table: the term for positions ``0 .. n - 1`` inside the cache, shape ``(heads, n)``, float32, as the
            model itself would add it to the scaled score (rounded to the model's dtype where the model does so).
    """

    table: Callable[[int], Tensor]

    @cached_property
    def slopes(self) -> Tensor:
        """What one position more adds, shape ``(heads,)``."""
        first = self.table(2)
        return first[:, 1] - first[:, 0]

    @cached_property
    def linear(self) -> bool:
        """Whether terms are as good as linear: not rounded to half precision."""
        table = self.table(LOOKED_AT)
        line = self.slopes[:, None] * torch.arange(LOOKED_AT, device=table.device)
        return torch.allclose(table - table[:, :1], line, rtol=1e-5)
