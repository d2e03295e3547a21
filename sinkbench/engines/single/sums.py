"""Sums of a few vectors and norms, before them and of them, as one launch together."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.engines.single.norm import Norm, normalise
from sinkbench.engines.single.pending import Pending, whole

MOST = 2  # vectors that are added to a first one


@dataclass(frozen=True)
class Total:
    """A promise of ``first``, normalised or as it is, plus some more vectors of the same shape and dtype."""

    first: Tensor
    norm: Norm | None
    more: tuple[Tensor, ...]
    result: Tensor

    @property
    def results(self) -> tuple[Tensor, ...]:
        return (self.result,)

    @property
    def reads(self) -> tuple[Tensor, ...]:
        return self.first, *self.more

    def keep(self, pending: Pending) -> None:
        inner = pending.of(self.first)
        if self.more or not (isinstance(inner, Total) and inner.more and whole(self.first, inner.result)):
            pending.settle(self.first, *self.more)
            if self.more:
                normalise(self.first, self.norm, self.more, self.result, None, self.result)
            else:
                normalise(self.first, None, (), None, self.norm, self.result)
            return
        pending.kept(inner)
        pending.settle(inner.first, *inner.more)
        normalise(inner.first, inner.norm, inner.more, inner.result, self.norm, self.result)


def normalised(x: Tensor, norm: Norm, pending: Pending) -> Tensor:
    """``norm(x)`` of one vector, promised."""
    return _promised(Total(x, norm, (), torch.empty_like(x)), pending)


def added(x: Tensor, y: Tensor, pending: Pending) -> Tensor:
    """``x + y`` of two vectors, promised; takes over what either is promised to be, where it can."""
    result = torch.empty_like(x)
    for a, b in ((x, y), (y, x)):
        inner = pending.of(a)
        if isinstance(inner, Total) and len(inner.more) < MOST and whole(a, inner.result):
            return _promised(Total(inner.first, inner.norm, (*inner.more, b), result), pending)
    return _promised(Total(x, None, (y,), result), pending)


def _promised(total: Total, pending: Pending) -> Tensor:
    pending.promise(total)
    return total.result
