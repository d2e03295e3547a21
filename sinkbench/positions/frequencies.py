"""Rotary frequencies that follow the length of the sequence: dynamic NTK and longrope.

transformers keeps the present ones on the model, where every call finds those of the call before; dynamic NTK's are
even those of the longest text so far. So these models are one call's at a time.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import RLock
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from sinkbench.calls import NOTHING

_CHANGING: WeakKeyDictionary[PreTrainedModel, tuple[list[nn.Module], RLock]] = WeakKeyDictionary()


def frequencies_alone(model: PreTrainedModel, fresh: bool = False) -> AbstractContextManager[None]:
    """Within this context no other thread is in one, if frequencies of ``model`` change; otherwise, at once.

    Args:
        fresh: whether they are first those of a model that has read nothing.
    """
    known = _CHANGING.get(model)
    if known is None:
        known = _CHANGING.setdefault(model, ([m for m in model.modules() if _changes(m)], RLock()))
    modules, lock = known
    return _alone(modules, lock, fresh) if modules else NOTHING


@contextmanager
def _alone(modules: list[nn.Module], lock: RLock, fresh: bool) -> Iterator[None]:
    with lock:
        for module in modules if fresh else ():
            _forget(module)
        yield


def _kinds(module: nn.Module) -> dict[str, str]:
    """How frequencies are scaled, by the prefix of the attributes for one kind of layers."""
    kind = getattr(module, "rope_type", "default")
    return {f"{of}_": name for of, name in kind.items()} if isinstance(kind, dict) else {"": kind}


def _changes(module: nn.Module) -> bool:
    return any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in _kinds(module).values())


def _forget(module: nn.Module) -> None:
    """Dynamic NTK anew: longrope's depend on the present length alone."""
    for prefix, kind in _kinds(module).items():
        if "dynamic" in kind:
            present = getattr(module, f"{prefix}inv_freq")
            original = getattr(module, f"{prefix}original_inv_freq").to(present.device)
            module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
