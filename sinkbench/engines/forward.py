"""One token at a time through a cache of ours."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.adapters import mask_argument
from sinkbench.attention.redirection import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting, takes_positions


@dataclass
class OneByOne:
    """Feeds one token at a time through a model and a cache.

    Attributes:
        given: what every forward is given besides tokens, positions and cache.
        placed: whether forwards are given positions.
    """

    model: PreTrainedModel
    cache: StreamCache
    given: dict[str, Any]
    placed: bool

    def __call__(self, token: Tensor) -> Any:
        """One forward over ``token``, shape ``(1,)``, at the position that the cache gives it."""
        positions = self.cache.advance(1)
        given = {**self.given, "position_ids": positions} if self.placed else self.given
        return self.model(input_ids=token[None], past_key_values=self.cache, use_cache=True, **given)


@contextmanager
def one_by_one(model: PreTrainedModel, cache: StreamCache, length: int) -> Iterator[OneByOne]:
    """Within this context, what it gives feeds ``model`` one token at a time through ``cache``, ``length`` in all."""
    with lasting(model, longest_of(cache, length)), exact_angles(model), reading(model, cache):
        yield feeding(model, cache)


def longest_of(cache: StreamCache, length: int) -> int:
    """Positions for which tables of a model have to last where ``length`` tokens are fed one at a time."""
    return min(length, cache.reach.end(1))


def reading(model: PreTrainedModel, cache: StreamCache) -> AbstractContextManager[None]:
    """Within this context, attention reads ``cache`` as its plan says, one token at a time."""
    return attending(model, cache) if cache.needs_attention else nullcontext()


def feeding(model: PreTrainedModel, cache: StreamCache) -> OneByOne:
    """What feeds ``model`` one token at a time through ``cache``; what forwards are given is found once."""
    return OneByOne(model, cache, mask_argument(model) if cache.needs_attention else {}, takes_positions(model))
