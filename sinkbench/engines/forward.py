"""One forward through a cache of ours."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.adapters import mask_argument
from sinkbench.attention.redirection import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting, takes_positions


def feed(model: PreTrainedModel, cache: StreamCache, tokens: Tensor) -> Any:
    """One forward of ``model`` over ``tokens``, shape ``(n,)``, at the positions that ``cache`` gives them."""
    positions = cache.advance(len(tokens))
    kwargs = {"position_ids": positions} if takes_positions(model) else {}
    kwargs |= mask_argument(model) if cache.needs_attention else {}
    return model(input_ids=tokens[None], past_key_values=cache, use_cache=True, **kwargs)


@contextmanager
def one_by_one(model: PreTrainedModel, cache: StreamCache, length: int) -> Iterator[None]:
    """Within this context, ``model`` can be fed one token at a time through ``cache``, ``length`` in all."""
    with lasting(model, longest_of(cache, length)), exact_angles(model), reading(model, cache):
        yield


def longest_of(cache: StreamCache, length: int) -> int:
    """Positions for which tables of a model have to last where ``length`` tokens are fed one at a time."""
    return min(length, cache.reach.end(1))


def reading(model: PreTrainedModel, cache: StreamCache) -> AbstractContextManager[None]:
    """Within this context, attention reads ``cache`` as its plan says, one token at a time."""
    return attending(model, cache) if cache.needs_attention else nullcontext()
