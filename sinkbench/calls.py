"""What holds in one call alone: in this thread, or this task, and nowhere else.

Models are shared by threads. What a call needs changed of one is put there while any call is under way, and acts in
those calls alone that asked for it; to all others it is as if it were not there, and with the last call it goes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from threading import RLock
from types import MappingProxyType
from typing import Any

NOTHING: AbstractContextManager[None] = nullcontext()  # what a call needs that needs nothing changed
LOCK = RLock()  # for putting things there and taking them away; never held while a model runs


@dataclass
class _Held:
    value: Any
    open: bool = True  # a context may outlive the call, as that of a generator which another thread ends


_HERE: ContextVar[Mapping[Any, _Held]] = ContextVar("sinkbench", default=MappingProxyType({}))


@contextmanager
def held_here(values: Mapping[Any, Any]) -> Iterator[None]:
    """Within this context, in this thread or task alone, :func:`here` knows ``values`` by their keys."""
    mine = {key: _Held(value) for key, value in values.items()}
    outer = {key: _HERE.get()[key] for key in mine.keys() & _HERE.get().keys()}
    _HERE.set({**_HERE.get(), **mine})
    try:
        yield
    finally:
        for held in mine.values():
            held.open = False
        # not a token, which only the very context that it came from takes back
        left = {key: held for key, held in _HERE.get().items() if mine.get(key) is not held}
        _HERE.set({**outer, **left})


def here(key: Any) -> Any:
    """What this call holds by ``key``; ``None`` where that is nothing."""
    held = _HERE.get().get(key)
    return held.value if held is not None and held.open else None


class StandIn:
    """Stands before the method ``name`` of ``owner``; other calls find the method itself."""

    def __init__(self, owner: Any, name: str) -> None:
        self.own, self.before, self.users = getattr(owner, name), vars(owner).get(name), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        method = here(id(self))
        return self.own(*args, **kwargs) if method is None else method(self.own, *args, **kwargs)


@contextmanager
def standing_in(methods: Mapping[tuple[Any, str], Callable[..., Any]]) -> Iterator[None]:
    """Within this context, in this thread or task alone, methods of objects are others.

    Args:
        methods: by object and name, what is called instead, with the method itself and its arguments.
    """
    there: list[tuple[Any, str, StandIn]] = []
    try:
        with LOCK:
            for owner, name in methods:
                stand_in = vars(owner).get(name)
                if not isinstance(stand_in, StandIn):
                    stand_in = StandIn(owner, name)
                    object.__setattr__(owner, name, stand_in)
                stand_in.users += 1
                there.append((owner, name, stand_in))
        by_stand_in = zip(there, methods.values(), strict=True)
        with held_here({id(stand_in): method for (_, _, stand_in), method in by_stand_in}):
            yield
    finally:
        with LOCK:
            for owner, name, stand_in in there:
                _leave(owner, name, stand_in)


def _leave(owner: Any, name: str, stand_in: StandIn) -> None:
    stand_in.users -= 1
    if stand_in.users or vars(owner).get(name) is not stand_in:
        return  # others need it, or somebody stood another one before it
    if stand_in.before is None:
        object.__delattr__(owner, name)
    else:
        object.__setattr__(owner, name, stand_in.before)
