"""Small keys (arXiv 2406.11430, section 4; kvpress' KnormPress at every step)."""

from typing import TYPE_CHECKING

from sinkbench.strategies.base import Eviction, Held

if TYPE_CHECKING:
    from torch import Tensor


class Knorm(Eviction):
    """Those whose keys have the smallest norm."""

    def score(self, held: Held) -> "Tensor":
        return -held.keys.norm(dim=-1)
