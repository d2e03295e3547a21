"""A layer that holds everything, in two versions: as computed while it is new, in few bits afterwards (KIVI).

The token at which an entry passes from the one to the other is known beforehand (:meth:`Kivi.quantised`). It is encoded
once, after the attention of that token's step; here before the next token joins, between which nothing reads it.
"""

from torch import Tensor

from sinkbench.cache.formats import kivi_keys, kivi_values
from sinkbench.cache.strip import StripLayer
from sinkbench.errors import UserError
from sinkbench.positions.rotary import Rope
from sinkbench.strategies import LayerPlan
from sinkbench.strategies.formats import Kivi


class KiviLayer(StripLayer):
    """A strip from which nothing ever goes, so that a token's slot is its index in the text."""

    def __init__(self, plan: LayerPlan, rope: Rope | None) -> None:
        super().__init__(plan, rope)
        assert isinstance(plan.format, Kivi)
        self.format = plan.format
        self.quantised_keys = self.quantised_values = 0  # how many of the first ones are

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`StripLayer.update`.

        Raises:
            UserError: several tokens at once, where the attention does not know of versions.
        """
        if key_states.shape[-2] > 1 and not self.sinks_in_attention:
            raise UserError(f"a cache in {self.format.name} reads one token at a time: use --engine stepwise")
        self.quantise(self.seen)
        return super().update(key_states, value_states)

    def quantise(self, seen: int) -> None:
        """Store what is quantised once ``seen`` tokens have been fed."""
        span, coded = self.coming_keys(seen)
        if coded is not None:
            self.keys[:, :, span] = coded
        self.quantised_keys = span.stop
        span, coded = self.coming_values(seen)
        if coded is not None:
            self.values[:, :, span] = coded
        self.quantised_values = span.stop

    def coming_keys(self, seen: int) -> tuple[slice, Tensor | None]:
        """Which keys are yet to be quantised by then, and as what; ``None`` where there are none."""
        span = slice(self.quantised_keys, max(self.quantised_keys, int(self.format.keys_quantised(seen))))
        return span, kivi_keys(self.format, self.keys[:, :, span]) if span.start < span.stop else None

    def coming_values(self, seen: int) -> tuple[slice, Tensor | None]:
        """As :meth:`coming_keys`, of values."""
        span = slice(self.quantised_values, max(self.quantised_values, int(self.format.values_quantised(seen))))
        return span, kivi_values(self.format, self.values[:, :, span]) if span.start < span.stop else None

    def reset(self) -> None:
        super().reset()
        self.quantised_keys = self.quantised_values = 0
