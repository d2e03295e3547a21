"""What the device at hand can do: its memory, its bandwidth and its rate of arithmetic, measured in about a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import psutil
import torch

from sinkbench.config import ModelSource, RunConfig
from sinkbench.models.loading import TORCH_DTYPES
from sinkbench.models.sizes import ModelSizes


@dataclass(frozen=True)
class Device:
    """What a device can do with numbers of one type.

    Attributes:
        kind: ``cuda`` or ``cpu``.
        memory: bytes free.
        bandwidth: bytes a second of a large matrix, read to be multiplied with one vector.
        rate: operations a second of a large matrix product.
    """

    kind: str
    memory: int
    bandwidth: float
    rate: float


def device_for(options: RunConfig | ModelSource, shape: ModelSizes) -> Device:
    """The device that ``options``, or their model, would run on, measured for about a second the first time."""
    kind = "cuda" if torch.cuda.is_available() and options.device_map != "cpu" else "cpu"
    free = torch.cuda.mem_get_info()[0] if kind == "cuda" else psutil.virtual_memory().available
    dtype = dtype_of(options, shape, kind)
    return Device(kind, free, bandwidth(kind, dtype), matrix_rate(kind, dtype))


def dtype_of(options: RunConfig | ModelSource, shape: ModelSizes, kind: str) -> torch.dtype:
    """The type of the weights: ``auto`` is float32 on a CPU and the checkpoint's own on CUDA."""
    name = options.dtype
    if name == "auto":
        name = "float32" if kind == "cpu" else shape.dtype
    return TORCH_DTYPES[name]


@lru_cache
def bandwidth(kind: str, dtype: torch.dtype) -> float:
    """Bytes a second of a large matrix that is multiplied with one vector."""
    rows = 2**15 if kind == "cuda" else 2**13
    matrix = torch.empty(rows, 4096, dtype=dtype, device=kind).fill_(0.5)
    vector = torch.empty(4096, dtype=dtype, device=kind).fill_(0.5)
    return matrix.nbytes / _best(partial(torch.mv, matrix, vector))


@lru_cache
def matrix_rate(kind: str, dtype: torch.dtype) -> float:
    """Operations a second of matrix products, the larger the better, as far as half a second goes."""
    n, seconds, rate = 256, 0.0, 0.0
    while n <= (8192 if kind == "cuda" else 2048) and 8 * seconds < 0.5:  # twice the size is eight times the work
        a = torch.randn(n, n, device=kind).to(dtype)
        seconds = _best(partial(torch.matmul, a, a))
        rate, n = max(rate, 2 * n**3 / seconds), 2 * n
    return rate


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest run in a tenth of a second, and of three at least, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < 3 or sum(times) < 0.1:
        _synchronize()
        begin = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
