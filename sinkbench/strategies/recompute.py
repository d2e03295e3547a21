"""Sliding window with re-computation: the baseline of StreamingLLM (arXiv 2309.17453, figure 1c)."""

from sinkbench.strategies.base import Strategy
from sinkbench.strategies.policy import Policy


class Recompute(Strategy):
    """Nothing: each token is predicted from a fresh forward over the last tokens, as many as the window."""

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window)

    def context(self, window: int) -> int | None:
        return window
