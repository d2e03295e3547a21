"""CUDA kernels, those for the processor, and the plain torch that says what they must compute."""

import os
from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor

MEETING = 16  # programs of a scan that wait for each other at every token, at most
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by Triton, which then runs its programs on a processor


@cache  # every layer of every chunk asks
def compilable(module: str) -> ModuleType | None:
    """The module of this name; ``None`` where what compiles it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        return None


def kernels(name: str) -> ModuleType | None:
    """As :func:`compilable`, of the kernels here."""
    return compilable(f"{__name__}.{name}")


def compiled_for(x: Tensor) -> bool:
    """Whether Triton's programs run on the device of ``x``."""
    return x.is_cuda or INTERPRETED


def reason_of(error: Exception) -> str:
    """What to say of a kernel that could not be compiled, in a part of a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def of_compiler(error: Exception) -> bool:
    """Whether a kernel could not be compiled; then nothing of it has run."""
    return type(error).__module__.split(".")[0] in ("triton", "numba") or "PassManager" in str(error)
