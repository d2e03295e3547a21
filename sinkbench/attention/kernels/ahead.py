"""Kernels that are made at the same time, by a run in which those that are still to be made are not launched.

Made one after the other, each as it is first launched, the kernels of a step take ten seconds and more: passes of a
compiler, an assembler, and a C compiler for what launches it, most of which let other threads go on.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import torch
import triton

from sinkbench.compilers import INTERPRETED, launching_on


def launch(program: Any, grid: tuple[int, ...], *args: Any, **told: Any) -> None:
    """Launch a Triton program; within :func:`asking`, ask for its kernel, and launch it only where that is there."""
    making = MAKING.get()
    if making is None or not making.asks(program, *args, grid=grid, **told):
        program[grid](*args, **told)


@contextmanager
def asking(device: torch.device) -> Iterator[None]:
    """Within this context launches ask for kernels, which are made by threads; at its end all of them are there.

    What a kernel that is not there yet would have written is whatever lay in memory. One that cannot be made says so
    where it is launched later.
    """
    if INTERPRETED or device.type != "cuda":
        yield
        return
    with ThreadPoolExecutor() as pool:
        making = Making(pool, device)
        with _by(making):
            yield
        making.finish()


def awaiting() -> AbstractContextManager[None]:
    """Within this context, in :func:`asking`, all launches are made: somebody looks at what they find."""
    return _by(None)


class Making(Executor):
    """Kernels that are being made by threads of ``pool``, and, beside what Triton makes, what launches them."""

    def __init__(self, pool: Executor, device: torch.device) -> None:
        self.pool, self.device = pool, device
        self.mode = triton.AsyncCompileMode(self, ignore_errors=True)
        # it holds in a context of its own: whoever is interrupted here leaves nothing behind
        self.context = copy_context()
        self.context.run(self.mode.__enter__)

    def asks(self, program: Any, *args: Any, **told: Any) -> bool:
        """Whether the kernel for these arguments is not there yet; it is made then, from the first time on."""
        return hasattr(self.context.run(program.run, *args, warmup=True, **told), "result")

    def finish(self) -> None:
        """Wait for all of them."""
        self.context.run(self.mode.__exit__, None, None, None)

    def submit(self, make: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.pool.submit(self._made, make)

    def _made(self, make: Callable[[], Any]) -> Any:
        kernel = make()
        with launching_on(self.device):
            kernel.run  # noqa: B018 # a property, which compiles and loads when it is first asked for
        return kernel


MAKING: ContextVar[Making | None] = ContextVar("making", default=None)


@contextmanager
def _by(making: Making | None) -> Iterator[None]:
    before = MAKING.set(making)
    try:
        yield
    finally:
        MAKING.reset(before)
