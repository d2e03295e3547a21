"""Results that are promised: their memory is there, and what fills it is launched when something reads it.

So what comes next may do that work along with its own, and spare a launch: attention turns its heads itself, a norm
forms the sum that it is asked for. What nobody reads is never computed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class Promise(Protocol):
    """What will fill :attr:`results`, each of a memory of its own, from :attr:`reads`."""

    @property
    def results(self) -> tuple[Tensor, ...]: ...

    @property
    def reads(self) -> tuple[Tensor, ...]: ...

    def keep(self, pending: "Pending") -> None:
        """Launch it."""


class Pending:
    """Promises of one forward; outside :meth:`open` each is kept as soon as it is made."""

    def __init__(self) -> None:
        self.promises: dict[int, Promise] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within this context, who reads a tensor says so (:meth:`settle`), and promises can wait."""
        self.promises = {}
        try:
            yield
        finally:
            self.promises = None

    def promise(self, promise: Promise) -> None:
        """Let the results be filled when they are read."""
        if self.promises is None:
            promise.keep(self)
        else:
            self.promises |= {memory(x): promise for x in promise.results}

    def of(self, x: Tensor) -> Promise | None:
        """What ``x`` waits for."""
        return self.promises.get(memory(x)) if self.promises else None

    def kept(self, promise: Promise) -> None:
        """To be called by who has filled the results of ``promise`` along with their own."""
        for x in promise.results if self.promises else ():
            self.promises.pop(memory(x), None)

    def settle(self, *values: object) -> None:
        """Fill those tensors among ``values`` that are promised: they are about to be read."""
        for x in values if self.promises else ():
            promise = self.of(x) if isinstance(x, Tensor) else None
            if promise is not None:
                self.kept(promise)
                promise.keep(self)

    def changes(self, *tensors: Tensor) -> None:
        """Fill what is still to be read from these tensors: they are about to be changed."""
        changed = {memory(x) for x in tensors}
        for promise in list((self.promises or {}).values()):
            if changed & {memory(x) for x in promise.reads}:
                self.settle(*promise.results)


def memory(x: Tensor) -> int:
    """Where the memory begins that ``x`` is a view of."""
    return x.untyped_storage().data_ptr()


def whole(x: Tensor, result: Tensor) -> bool:
    """Whether ``x`` is all of ``result``, in the same order, whatever its shape."""
    return x.data_ptr() == result.data_ptr() and x.numel() == result.numel() and x.is_contiguous()
