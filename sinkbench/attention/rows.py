"""What a scan reads of a layer, for one chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from sinkbench.cache.scored import ScoredLayer
from sinkbench.strategies import Eviction, Policy


@dataclass
class Rows:
    """What a scan reads, for a chunk of ``n`` queries over ``m`` columns.

    Attributes:
        policy: how many entries are held, and which are protected.
        layer: number of the layer among those that the strategy governs.
        held: columns that were held before the chunk.
        first: index in the text of the chunk's first token.
        tokens: of each column, int64, ``(B, H, m)``.
        keys: ``(B, H, m, D)``.
        memory: what the strategy carries, ``(B, H, m)``; left as it is after the chunk for what is alive then.
        n: queries.
        form: gives :attr:`scores`, where they are looked at.
        extra: a logit that joins each softmax, ``(H, G)``.
        beside: scans that may run at once on the device.
    """

    policy: Policy
    layer: int
    held: int
    first: int
    tokens: Tensor
    keys: Tensor
    memory: dict[str, Tensor]
    n: int
    form: Callable[[], Tensor]
    extra: Tensor | None
    beside: int = 1

    @classmethod
    def of(cls, layer: ScoredLayer, n: int, form: Callable[[], Tensor], extra: Tensor | None) -> "Rows":
        """What a scan reads of ``layer``, just after its update by ``n`` tokens."""
        columns = layer.columns
        assert columns is not None
        first, keys, memory = layer.seen - n, columns.keys, columns.memory
        of_text = columns.held, first, columns.tokens, keys, memory, n
        return cls(layer.policy, layer.number, *of_text, form, extra, 1 if layer.lane is None else layer.lane.count)

    @cached_property
    def scores(self) -> Tensor:
        """Of all queries with all columns, those that none may see among them, ``(B, H, G, n, m)``."""
        return self.form()

    @property
    def window(self) -> int:
        assert self.policy.window is not None
        return self.policy.window

    @property
    def eviction(self) -> Eviction:
        assert self.policy.eviction is not None
        return self.policy.eviction
