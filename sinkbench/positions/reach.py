"""How far positions may go: where a model's rotary frequencies hold, and where float32 angles are exact enough."""

from collections.abc import Iterable
from dataclasses import dataclass

from sinkbench.positions.rotary import Rope
from sinkbench.strategies import Plan

UNBOUNDED = 2**62
SPARE = 512  # positions beyond a window, at least, before keys are moved back


def shortest_limit(ropes: Iterable[Rope | None]) -> int | None:
    """The length of sequence at which the first of ``ropes`` changes its frequencies; ``None`` where none does."""
    return min((rope.limit for rope in ropes if rope is not None and rope.limit is not None), default=None)


@dataclass(frozen=True)
class Reach:
    """What positions a plan may use with the ropes of a model.

    Attributes:
        window: the most entries that a layer holds; ``None`` without a bound.
        limit: the longest sequence for which frequencies do not change; ``None`` where they never do.
        anew: whether frequencies change inside the window, so that every step turns every key anew.
        fixed: whether positions are those of the text for good: keys are never moved.
    """

    window: int | None
    limit: int | None
    anew: bool
    fixed: bool

    @classmethod
    def of(cls, plan: Plan, ropes: Iterable[Rope | None], spare: int) -> "Reach":
        """``spare``: positions beyond the window that a cache goes through, at least, between two moves of its keys."""
        limit, window = shortest_limit(ropes), plan.longest
        in_cache = plan.positions == "cache" and window is not None
        anew = in_cache and limit is not None and window is not None and window + spare > limit
        scored_in_text = plan.by_score and plan.positions == "text"
        fixed = window is None or scored_in_text or (limit is not None and not in_cache)
        return cls(window, limit, anew, fixed)

    def end(self, n: int) -> int:
        """Positions of ``n`` tokens at a time stay below this."""
        if self.fixed or self.window is None:
            return UNBOUNDED
        if self.anew:
            return self.window + 1  # the last position inside the cache, plus one
        spacious = max(2 * self.window, self.window + SPARE, self.window + n)
        return spacious if self.limit is None else min(spacious, self.limit)

    def lasts(self, length: int) -> bool:
        """Whether many tokens at a time see the frequencies of token by token, in a stream of ``length`` tokens."""
        return self.limit is None or (not self.anew and (not self.fixed or length <= self.limit))

    def chunk(self, chunk: int) -> int:
        """At most ``chunk`` tokens at a time, for which frequencies hold."""
        return (
            chunk if self.limit is None or self.fixed or self.window is None else min(chunk, self.limit - self.window)
        )
