"""A configuration that names another attention in one call alone.

transformers' models ask their configuration by which name to look their attention up. While any call is under way, the
configuration is of a class that answers as the call it is asked in; to all others it answers as ever.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from transformers import PreTrainedConfig

from sinkbench.calls import LOCK, held_here, here

_CALLS: Counter[int] = Counter()  # under way, by configuration


@contextmanager
def naming(configs: Sequence[PreTrainedConfig], name: str, value: Any) -> Iterator[None]:
    """Within this context, in this thread or task alone, ``configs`` name the attention ``name``.

    Until then :func:`~sinkbench.calls.here` knows ``value`` by the id of each.
    """
    with LOCK:
        for config in configs:
            _CALLS[id(config)] += 1
            if _CALLS[id(config)] == 1:
                object.__setattr__(config, "__class__", _answering(type(config), name))
    try:
        with held_here({id(config): value for config in configs}):
            yield
    finally:
        with LOCK:
            for config in configs:
                _CALLS[id(config)] -= 1
                if not _CALLS[id(config)]:
                    del _CALLS[id(config)]
                    object.__setattr__(config, "__class__", type(config).__mro__[2])


class _Answers:
    """The first base of a class of configurations that answer as the call they are asked in."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not transformers', which would make a dataclass of it anew."""


@cache
def _answering(kind: type[PreTrainedConfig], name: str) -> type[PreTrainedConfig]:
    def get(config: Any) -> Any:
        return config._attn_implementation_internal if here(id(config)) is None else name

    def reduce(config: Any, protocol: int) -> Any:
        """A copy is of the class that it was before: no call of ours is under way with it."""
        return object.__new__, (kind,), dict(vars(config))

    own: Any = kind._attn_implementation
    members = {"_attn_implementation": property(get, own.fset), "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (_Answers, kind), members | {"__qualname__": kind.__qualname__, "__doc__": kind.__doc__})
