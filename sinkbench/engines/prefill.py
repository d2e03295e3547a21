"""A stream taken up in the middle: the cache that feeding its first tokens one by one would have left."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.stream import StreamCache
from sinkbench.engines.forward import feed
from sinkbench.engines.parallel import chunk_for, hidden_states
from sinkbench.errors import UserError
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.strategies import Keep


@torch.inference_mode()
def prefilled(model: PreTrainedModel, keep: Keep, tokens: Tensor) -> StreamCache:
    """A cache that has seen ``tokens`` (int64, shape ``(n,)``), read in chunks where the model allows it.

    What a window keeps depends, layer by layer, on tokens that have long left it, so all of them are read.
    """
    cache = StreamCache(model, keep)
    if not len(tokens):
        return cache
    tokens = tokens.to(model.device)
    try:
        for _ in hidden_states(model, cache, tokens, chunk_for(model)):
            pass
    except UserError:  # a model that only goes token by token; refused before anything is fed
        cache = StreamCache(model, keep)
        with lasting(model, len(tokens) + 1 if keep.window is None else cache.reach(1)), exact_angles(model):
            for t in range(len(tokens)):
                feed(model, cache, tokens[t : t + 1])
    for layer in cache.kept:
        layer.settle()
    return cache
