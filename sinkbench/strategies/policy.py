"""What one layer holds between two steps: the arithmetic of eviction, in one place."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from sinkbench.errors import UserError

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from sinkbench.strategies.base import Eviction

Count = TypeVar("Count", int, "ndarray", "Tensor")


@dataclass(frozen=True)
class Policy:
    """At most ``window`` entries are held between two steps; after a step that leaves more, some go.

    Attributes:
        window: entries held at most; ``None`` where nothing is ever dropped.
        sinks: the first tokens of the stream, which never go.
        block: how many go at once: the oldest ones behind the sinks.
        eviction: chooses the one that goes by a score instead; ``None`` where position alone decides.
        protected: the last tokens, the newest included, that no score can evict.
    """

    window: int | None
    sinks: int = 0
    block: int = 1
    eviction: "Eviction | None" = None
    protected: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UserError(f"the number of attention sinks cannot be negative (got {self.sinks})")
        if self.window is None:
            return
        if self.window <= self.sinks:
            raise UserError(
                f"the window of {self.window} must be larger than the {self.sinks} attention sinks: "
                "raise --window-size or lower --attention-sink-size"
            )
        if self.eviction is not None and self.window <= self.sinks + self.protected:
            raise UserError(
                f"the window of {self.window} must be larger than the {self.sinks} sinks and the {self.protected} "
                "recent tokens that it protects: raise --window-size, or lower sinks or recent"
            )

    @property
    def recent(self) -> int | None:
        """Entries held behind the sinks at most; ``None`` without a bound."""
        return None if self.window is None else self.window - self.sinks

    @property
    def by_score(self) -> bool:
        """Whether what goes depends on more than positions."""
        return self.eviction is not None

    def dropped(self, fed: Count) -> Count:
        """How many of the first ``fed`` tokens of a stream are gone once they have been fed."""
        if self.window is None:
            return 0 * fed
        over = fed - self.window
        return (over > 0) * (-(-over // self.block) * self.block)

    def held(self, fed: Count) -> Count:
        """How many entries are held after ``fed`` tokens; so where the next token stands inside the cache."""
        return fed - self.dropped(fed)

    def oldest(self, fed: Count) -> Count:
        """The index of the oldest token behind the sinks that is held after ``fed`` tokens, where position decides."""
        return self.sinks + self.dropped(fed)
