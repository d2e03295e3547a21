"""CUDA kernels, those for the processor, and the plain torch that says what they must compute."""

from types import ModuleType

from sinkbench.compilers import compilable

MEETING = 16  # programs of a scan that wait for each other at every token, at most


def kernels(name: str) -> ModuleType | None:
    """As :func:`compilable`, of the kernels here."""
    return compilable(f"{__name__}.{name}")
