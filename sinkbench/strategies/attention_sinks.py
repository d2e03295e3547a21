"""Attention sinks: the first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453, section 3.2)."""

from typing import ClassVar

from sinkbench.strategies.base import Strategy
from sinkbench.strategies.plan import Positions
from sinkbench.strategies.policy import Policy
from sinkbench.validation import Whole


class AttentionSinks(Strategy):
    """The first tokens and the last ones, as many in all as the window (StreamingLLM)."""

    positions: ClassVar[Positions] = "cache"
    sinks: Whole = 4

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window, self.sinks)
