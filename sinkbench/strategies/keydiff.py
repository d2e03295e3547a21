"""Keys that differ from the others (KeyDiff, arXiv 2504.15364, section 3)."""

from sinkbench.strategies.base import Eviction, Held


class KeyDiff(Eviction):
    """Those whose keys point away from the mean direction of all that are held."""

    pattern, together = "alike", True

    def score(self, held: Held):  # noqa: ANN201
        keys = held.keys / held.keys.norm(dim=-1, keepdim=True)
        mean = keys.mean(2, keepdim=True)
        return -(keys * mean).sum(-1) / mean.norm(dim=-1)
