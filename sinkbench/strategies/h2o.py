"""Heavy hitters (H2O, arXiv 2306.14048, section 4.2, algorithm 1; its "real drop").

The published simulation sums the weights of all queries of a prompt, future ones included; here, as in its real drop,
only queries that came count. With ``average`` the score is that of cold-compress, which divides by how many queries an
entry has met; it cuts before the attention, so that its cache of n is a window of n - 1.
"""

from typing import TYPE_CHECKING, ClassVar

from sinkbench.strategies.base import Eviction, Held, Pattern
from sinkbench.validation import Flag, Whole

if TYPE_CHECKING:
    from torch import Tensor


class H2O(Eviction):
    """The last tokens, and those that all queries together gave the most attention."""

    memory: ClassVar[tuple[str, ...]] = ("total",)
    together: ClassVar = True

    recent: Whole | None = None  # type: ignore[assignment] # half the window, unless given
    average: Flag = False

    def protected(self, window: int) -> int:
        return window // 2 if self.recent is None else self.recent

    @property
    def pattern(self) -> Pattern:  # type: ignore[override]
        return "averaged" if self.average else "summed"

    def score(self, held: Held) -> "Tensor":
        total = held.memory["total"]
        total += held.weights.sum(2)  # over the queries of a group
        return total / (held.now - held.tokens + 1) if self.average else total
