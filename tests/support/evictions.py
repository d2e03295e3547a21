"""What layers evict, seen from the side of the tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

from sinkbench.cache.scored import ScoredLayer

Evictions = dict[tuple[int, int], list[tuple[int, int]]]


@contextmanager
def watched() -> Iterator[Evictions]:
    """What layers evict within this context: steps and tokens of each layer and head of the first stream."""
    found: Evictions = {}
    evict, keep = ScoredLayer.evict, ScoredLayer.keep

    def watch(layer: ScoredLayer, weights: Tensor) -> None:
        held = layer.tokens[0, :, : layer.present].clone()
        evict(layer, weights)
        if layer.present > layer.window:
            for head, (tokens, slot) in enumerate(zip(held, layer.free[0, :, 0], strict=True)):
                found.setdefault((layer.number, head), []).append((layer.seen - 1, int(tokens[slot])))

    def watch_chunk(layer: ScoredLayer, died: Tensor) -> None:
        columns = layer.columns
        assert columns is not None
        tokens, n = columns.tokens[0], columns.tokens.shape[2] - columns.held
        keep(layer, died)
        for head, (mine, when) in enumerate(zip(tokens, died[0], strict=True)):
            gone = sorted((layer.seen - n + int(i), int(t)) for i, t in zip(when, mine, strict=True) if i < n)
            if gone:
                found.setdefault((layer.number, head), []).extend(gone)

    with patch.object(ScoredLayer, "evict", watch), patch.object(ScoredLayer, "keep", watch_chunk):
        yield found
