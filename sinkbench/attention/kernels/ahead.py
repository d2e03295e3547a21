"""Kernels that are made at the same time, by a run in which those that are still to be made are not launched.

Made one after the other, each as it is first launched, the kernels of a step take ten seconds and more: passes of a
compiler, an assembler, and a C compiler for what launches it, most of which let other threads go on.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton

from sinkbench.compilers import INTERPRETED, launching_on

ASKING: ContextVar[bool] = ContextVar("asking", default=False)


def launch(program: Any, grid: tuple[int, ...], *args: Any, **told: Any) -> None:
    """Launch a Triton program; within :func:`asking`, ask for its kernel, and launch it only where that is there."""
    if ASKING.get() and hasattr(program.run(*args, grid=grid, warmup=True, **told), "result"):
        return
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
    with (
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(_Making(pool, device), ignore_errors=True),
        _asking(True),
    ):
        yield


def launching() -> AbstractContextManager[None]:
    """Within this context, in :func:`asking`, kernels are waited for and launched: somebody looks at what they find."""
    return _asking(False)


@contextmanager
def _asking(whether: bool) -> Iterator[None]:
    before = ASKING.set(whether)
    try:
        yield
    finally:
        ASKING.reset(before)


class _Making(Executor):
    """Makes kernels by threads of ``pool``, and, as the compiler alone does not, what launches them on ``device``."""

    def __init__(self, pool: Executor, device: torch.device) -> None:
        self.pool, self.device = pool, device

    def submit(self, make: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.pool.submit(self._made, make)

    def _made(self, make: Callable[[], Any]) -> Any:
        kernel = make()
        with launching_on(self.device):
            kernel.run  # noqa: B018 # a property, which compiles and loads when it is first asked for
        return kernel
