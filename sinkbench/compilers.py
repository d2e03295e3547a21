"""Programs that are compiled where they run, by Triton or numba: whether they can be had, and what failed."""

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib import import_module
from subprocess import CalledProcessError
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton, which then runs its programs on a processor
REFUSED: set[Any] = set()  # launches that a compiler has refused in this process: it would again, in every layer


@cache  # every layer of every chunk asks
def compilable(module: str) -> ModuleType | None:
    """The module of this name; ``None`` where what compiles it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        return None


def compiled_for(x: "Tensor") -> bool:
    """Whether Triton's programs run where ``x`` is: it launches them on the device in use, wherever tensors are."""
    return INTERPRETED or in_use(x)


def in_use(x: "Tensor") -> bool:
    """Whether ``x`` is on the GPU in use."""
    if not x.is_cuda:
        return False
    from torch.cuda import current_device

    return x.device.index == current_device()


def launching_on(device: "torch.device") -> AbstractContextManager[object]:
    """Within this context kernels are launched on ``device``, where that is a GPU."""
    if device.type != "cuda":
        return nullcontext()
    from torch.cuda import device as use

    return use(device)


def by_program(x: "Tensor", program: str, *args: Any) -> Any | None:
    """What a Triton program's ``module.function`` answers with; ``None`` where it cannot be had where ``x`` is."""
    module, _, name = program.rpartition(".")
    programs = compilable(module) if compiled_for(x) else None
    return None if programs is None else attempted(getattr(programs, name), *args)


def attempted(launch: Callable[..., T], *args: Any) -> T | None:
    """What ``launch`` answers with; ``None`` where it cannot be compiled, which one line says once."""
    if launch in REFUSED:
        return None
    try:
        return launch(*args)
    except Exception as error:
        if not _of_compiler(error):
            raise
        REFUSED.add(launch)
        what, why = launch.__name__.strip("_"), _reason_of(error)
        warnings.warn(f"the kernel for {what!r} cannot be compiled ({why}): torch computes it", stacklevel=2)
        return None


def _reason_of(error: Exception) -> str:
    """What to say of a program that could not be compiled, in a part of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _of_compiler(error: Exception) -> bool:
    """Whether a program could not be compiled; then nothing of it has run."""
    if type(error).__module__.split(".")[0] in ("triton", "numba") or isinstance(error, CalledProcessError):
        return True
    return "PassManager" in str(error) or "C compiler" in str(error)
