"""Window attention: the most recent tokens only (StreamingLLM, arXiv 2309.17453, figure 1b)."""

from typing import ClassVar

from sinkbench.strategies.base import Strategy
from sinkbench.strategies.plan import Positions
from sinkbench.strategies.policy import Policy


class Windowed(Strategy):
    """The last tokens, as many as the window."""

    positions: ClassVar[Positions] = "cache"

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window)
