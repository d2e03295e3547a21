"""Random eviction: the baseline that a score has to beat."""

from sinkbench.strategies.base import Eviction, Held
from sinkbench.strategies.draws import draw
from sinkbench.validation import Whole


class Random(Eviction):
    """Entries go at random, for each head of its own; the same in every engine."""

    pattern, together = "fixed", True
    seed: Whole = 0

    def score(self, held: Held):  # noqa: ANN201
        return draw(self.seed, held.layer if held.numbers is None else held.numbers, held.tokens)
