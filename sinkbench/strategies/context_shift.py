"""Context shift, as llama.cpp and its servers do it when a context is full (``n_keep``, ``n_discard``)."""

from typing import ClassVar

from sinkbench.strategies.base import Strategy
from sinkbench.strategies.plan import Positions
from sinkbench.strategies.policy import Policy
from sinkbench.validation import Whole


class ContextShift(Strategy):
    """The first tokens and the last ones; when the window overflows, the older half behind the first goes at once."""

    positions: ClassVar[Positions] = "cache"
    sinks: Whole = 4

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window, self.sinks, block=max(1, (window + 1 - self.sinks) // 2))
