"""Small keys (arXiv 2406.11430, section 4; kvpress' KnormPress at every step, where rounding decides between repeats of
a token: in layer 0 their keys have one norm. Here norms within 1e-6 of the largest tie, and the oldest goes)."""

from sinkbench.strategies.base import Eviction, Held


class Knorm(Eviction):
    """Those whose keys have the smallest norm."""

    pattern, together = "fixed", True
    tolerance = 1e-6  # float32 rotations of one key differ by up to 4e-7 of its norm

    def score(self, held: Held):  # noqa: ANN201
        return -held.keys.norm(dim=-1)
