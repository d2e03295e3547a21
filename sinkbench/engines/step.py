"""What an engine hands on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Steps:
    """Predictions of consecutive tokens: one step of the stepwise engine, one chunk of the parallel one.

    Attributes:
        first: tokens fed before the first of these predictions (1 for the start of a stream).
        nll: -ln p(next token), natural logarithm, computed in float32.
        latency: seconds of the step, device synchronised; ``None`` where no step a token happened.
        vram: GiB allocated over all visible CUDA devices; ``None`` without CUDA.
        kv_cache_bytes: keys and values that the strategy holds after each token.
        columns: further measures by column (:mod:`sinkbench.results.columns`), a value a prediction, or ``None``.
    """

    first: int
    nll: Sequence[float]
    latency: float | None
    vram: float | None
    kv_cache_bytes: Sequence[int]
    columns: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


def vram_allocated() -> float | None:
    """GiB that torch's caching allocator holds allocated on all visible CUDA devices, or ``None`` without CUDA."""
    if not torch.cuda.is_available():
        return None
    # torch.cuda.memory_allocated gives the same, but first lists every statistic by name, longer than a step takes
    stats = (torch.cuda.memory_stats_as_nested_dict(i) for i in range(torch.cuda.device_count()))
    return sum(s["allocated_bytes"]["all"]["current"] for s in stats if s) / 2**30


def synchronize() -> None:
    """Wait for all CUDA devices, where there are any."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
