"""Dense attention, as transformers does it."""

from sinkbench.strategies.base import Strategy
from sinkbench.strategies.policy import Policy


class Transformers(Strategy):
    """Everything (dense attention)."""

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(None)
