"""What a scan reads of a layer, for one chunk."""

from dataclasses import dataclass

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
        scores: of all queries with all columns, those that none may see among them, ``(B, H, G, n, m)``.
        extra: a logit that joins each softmax, ``(H, G)``.
    """

    policy: Policy
    layer: int
    held: int
    first: int
    tokens: Tensor
    keys: Tensor
    memory: dict[str, Tensor]
    scores: Tensor
    extra: Tensor | None

    @classmethod
    def of(cls, layer: ScoredLayer, scores: Tensor, extra: Tensor | None) -> "Rows":
        columns = layer.columns
        assert columns is not None
        first = layer.seen - scores.shape[3]
        keys, memory = columns.keys, columns.memory
        return cls(layer.policy, layer.number, columns.held, first, columns.tokens, keys, memory, scores, extra)

    @property
    def n(self) -> int:
        return self.scores.shape[3]

    @property
    def window(self) -> int:
        assert self.policy.window is not None
        return self.policy.window

    @property
    def eviction(self) -> Eviction:
        assert self.policy.eviction is not None
        return self.policy.eviction
