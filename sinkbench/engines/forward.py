"""One forward through a cache of ours."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.stream import StreamCache
from sinkbench.positions.families import takes_positions


def feed(model: PreTrainedModel, cache: StreamCache, tokens: Tensor) -> Any:
    """One forward of ``model`` over ``tokens``, shape ``(n,)``, at the positions that ``cache`` gives them."""
    positions = cache.advance(len(tokens))
    kwargs = {"position_ids": positions} if takes_positions(model) else {}
    return model(input_ids=tokens[None], past_key_values=cache, use_cache=True, **kwargs)
