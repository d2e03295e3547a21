"""Budgets that shrink from layer to layer (PyramidKV, arXiv 2406.02069, section 3)."""

from pydantic import Field

from sinkbench.errors import UserError
from sinkbench.strategies.base import Strategy
from sinkbench.strategies.policy import Policy
from sinkbench.validation import MOST, Whole


class Pyramid(Strategy):
    """The first tokens and the last ones, with a budget for each layer that shrinks linearly from bottom to top.

    The bottom layer holds ``2 W - W / beta`` entries, the top one ``W / beta``, all together ``W`` times the layers.
    PyramidKV itself scores entries by the attention of a prompt's last queries; a stream has no prompt, so that here
    budgets are the paper's and entries go by position.
    """

    sinks: Whole = 4
    beta: int = Field(default=20, ge=1, le=MOST)

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        budget = budgets(window, self.beta, layers)[layer]
        if budget <= self.sinks:
            raise UserError(
                f"pyramid leaves layer {layer} of {layers} a budget of {budget}, which must be larger than the "
                f"{self.sinks} sinks: raise --window-size, or lower --set beta or sinks"
            )
        return Policy(budget, self.sinks)


def budgets(window: int, beta: int, layers: int) -> list[int]:
    """Entries of each layer, ``window * layers`` in all, each within 1 of the line from bottom to top."""
    top = window / beta
    bottom = 2 * window - top
    exact = [bottom + (top - bottom) * i / (layers - 1) for i in range(layers)] if layers > 1 else [float(window)]
    floors = [int(budget) for budget in exact]
    left = window * layers - sum(floors)
    # what is left of the sum goes where the most was cut off
    largest = sorted(range(layers), key=lambda i: (floors[i] - exact[i], i))[:left]
    return [floor + (i in largest) for i, floor in enumerate(floors)]
