"""Tensors that are promised: what fills them is launched once it is known what reads them.

So a sum goes along with the norm behind it, an activation with the product that it is a factor of, and keys turn on
their way into a cache. What is promised looks like any other tensor; whatever torch is asked to do with it finds its
numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sinkbench.compilers import attempted
from sinkbench.engines.many.gate import gate
from sinkbench.engines.many.launching import takes
from sinkbench.engines.many.rotary import Turned
from sinkbench.engines.single.activation import ACTIVATIONS

# What is asked of a tensor without a look at its numbers.
UNREAD = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda")}
UNREAD |= {Tensor.size, Tensor.dim, Tensor.new_empty}


@dataclass(frozen=True)
class Sum:
    """``first + second``, contiguous, of one shape and dtype.

    Between a sum and what reads it, neither of the two may be changed in place. Models do not.
    """

    first: Tensor
    second: Tensor

    @property
    def like(self) -> Tensor:
        return self.first

    def keep(self) -> Tensor:
        return self.first + self.second


@dataclass(frozen=True)
class Activated:
    """The activation of this name, of ``like``."""

    like: Tensor
    name: str

    def keep(self) -> Tensor:
        return ACTIVATIONS[self.name](self.like)

    def times(self, y: Tensor) -> Tensor | None:
        """The product with ``y``, in one launch; ``None`` where it cannot be had so."""
        return attempted(gate, self.like, y, self.name) if takes(self.like, y) else None


Promise = Sum | Activated | Turned


class Later(Tensor):
    """A tensor that is promised, or that was: of a memory of no device, so that none of it is read unnoticed."""

    promise: Promise | None
    value: Tensor | None

    @classmethod
    def of(cls, promise: Promise) -> "Later":
        return cls._made(promise.like, promise, None)

    @classmethod
    def there(cls, value: Tensor) -> "Later":
        """What is there already: sums with it are promised."""
        return cls._made(value, None, value)

    @classmethod
    def _made(cls, like: Tensor, promise: Promise | None, value: Tensor | None) -> "Later":
        made: Later = Tensor._make_subclass(cls, torch.empty(like.shape, dtype=like.dtype, device="meta"))
        made.promise, made.value = promise, value
        return made

    def kept(self, value: Tensor) -> None:
        """To be called by who has computed the numbers along with their own."""
        self.promise, self.value = None, value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in UNREAD:
            promise = args[0].promise
            return func(args[0].value if promise is None else promise.like, *args[1:], **(kwargs or {}))
        answer = ANSWERS[func](*args, **(kwargs or {})) if func in ANSWERS else None
        if answer is not None:
            return answer
        return func(*settled(args), **({} if kwargs is None else {name: settled(x) for name, x in kwargs.items()}))


def settled(x: Any) -> Any:
    """``x``, or a list of them, with the numbers of what is promised."""
    if isinstance(x, Later):
        if x.promise is not None:
            x.kept(x.promise.keep())
        return x.value
    return type(x)(map(settled, x)) if type(x) in (tuple, list) else x


def _added(x: Any, y: Any, **more: Any) -> Tensor | None:
    x, y = settled(x), settled(y)
    return Later.of(Sum(x, y)) if not more and takes(x, y) and x.is_contiguous() and y.is_contiguous() else None


def _times(x: Any, y: Any, **more: Any) -> Tensor | None:
    for factor, other in ((x, y), (y, x)) if not more else ():
        if isinstance(other, float | int):
            return Later.there(settled(factor) * other)  # embeddings, scaled
        if isinstance(factor, Later) and isinstance(factor.promise, Activated):
            return factor.promise.times(settled(other))
    return None


def _copied(target: Any, source: Any, *more: Any, **others: Any) -> Tensor | None:
    promise = source.promise if isinstance(source, Later) and type(target) is Tensor else None
    return promise.into(target) if isinstance(promise, Turned) else None


def _dropped(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor | None:
    return None if training else x


ANSWERS: dict[Any, Callable[..., Tensor | None]] = {F.dropout: _dropped, Tensor.copy_: _copied}
ANSWERS |= dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _added)
ANSWERS |= dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _times)
