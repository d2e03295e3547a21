"""The shape every strategy answers with."""

from dataclasses import dataclass

from sinkbench.errors import UserError


@dataclass(frozen=True)
class Keep:
    """Which cache entries survive a step: the first ``sinks`` tokens and the last ``recent`` ones.

    ``recent`` is ``None`` where nothing is ever dropped. With ``fresh`` no cache is carried at all: every
    token's prediction comes from a forward over the last ``recent`` tokens alone.
    """

    sinks: int
    recent: int | None
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UserError(f"the number of attention sinks cannot be negative (got {self.sinks})")
        if self.recent is not None and self.recent < 1:
            raise UserError(
                f"the window of {self.recent + self.sinks} must be larger than the {self.sinks} attention sinks: "
                "raise --window-size or lower --attention-sink-size"
            )

    @property
    def window(self) -> int | None:
        """Entries held between two steps (``window_size``), or ``None`` without a bound."""
        return None if self.recent is None else self.sinks + self.recent
