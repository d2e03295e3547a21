"""CUDA kernels, those for the processor, and the plain torch that says what they must compute."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache  # every layer of every chunk asks
def kernels(name: str) -> ModuleType | None:
    """The module of kernels of this name; ``None`` where what compiles them is not installed."""
    try:
        return import_module(f"{__name__}.{name}")
    except ImportError:
        return None
