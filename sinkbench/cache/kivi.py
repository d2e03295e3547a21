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
        """As :meth:`StripLayer.update`, one token at a time.

        Raises:
            UserError: several tokens at once.
        """
        if key_states.shape[-2] > 1:
            raise UserError(f"a cache in {self.format.name} reads one token at a time: use --engine stepwise")
        self._quantise()
        return super().update(key_states, value_states)

    def _quantise(self) -> None:
        keys, values = self.format.quantised(self.seen)
        if keys > self.quantised_keys:
            new = slice(self.quantised_keys, keys)
            self.keys[:, :, new] = kivi_keys(self.format, self.keys[:, :, new])
        if values > self.quantised_values:
            new = slice(self.quantised_values, values)
            self.values[:, :, new] = kivi_values(self.format, self.values[:, :, new])
        self.quantised_keys, self.quantised_values = keys, values

    def reset(self) -> None:
        super().reset()
        self.quantised_keys = self.quantised_values = 0
