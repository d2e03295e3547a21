"""Token omission via attention (TOVA, arXiv 2401.06104, section 4).

The newest token itself can go; kvpress protects it: ``recent = 1``.
"""

from typing import TYPE_CHECKING, ClassVar

from sinkbench.strategies.base import Eviction, Held

if TYPE_CHECKING:
    from torch import Tensor


class Tova(Eviction):
    """Those that the newest query gives the most attention, the same for all heads of a layer."""

    choice: ClassVar = "layer"
    pattern: ClassVar = "newest"
    together: ClassVar = True

    def score(self, held: Held) -> "Tensor":
        return held.weights.mean((1, 2))[:, None]
