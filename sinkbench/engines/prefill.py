"""A stream taken up in the middle: the cache that feeding its first tokens one by one would have left."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.stream import StreamCache
from sinkbench.cache.trace import Trace
from sinkbench.engines.chunks import hidden_states, refuses_chunks
from sinkbench.engines.forward import one_by_one
from sinkbench.positions.bare import device_of
from sinkbench.signals import check
from sinkbench.strategies import Plan


@torch.inference_mode()
def prefilled(model: PreTrainedModel, plan: Plan, tokens: Tensor, trace: Trace | None = None) -> StreamCache:
    """A cache that has seen ``tokens`` (int64, shape ``(n,)``), read in chunks where the model allows it.

    What a window keeps depends, layer by layer, on tokens that have long left it, so all of them are read. One by one
    where rounding could decide otherwise what a score evicts, or which code a number gets.
    """
    cache = StreamCache(model, plan, trace)
    if not len(tokens):
        return cache
    tokens = tokens.to(device_of(model))
    close = plan.by_score or not plan.as_computed
    if not close and refuses_chunks(model, cache, len(tokens) + 1) is None:
        for _ in hidden_states(model, cache, [tokens]):
            pass
    else:
        with one_by_one(model, cache, len(tokens) + 1) as feed:
            for t in range(len(tokens)):
                check()
                feed(tokens[t : t + 1])
    for layer in cache.kept:
        layer.settle()
    return cache
