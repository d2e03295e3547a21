"""Many independent streams through one engine: side by side, or one after the other."""

from collections.abc import Iterator, Sequence

from torch import Tensor

from sinkbench.cache.trace import Trace
from sinkbench.engines.base import Engine
from sinkbench.engines.captured import Captured
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.step import Steps
from sinkbench.strategies import Plan


def run_many(
    engine: Engine,
    plan: Plan,
    streams: Sequence[Tensor],
    first: int = 0,
    start: int = 0,
    trace: Trace | None = None,
) -> Iterator[tuple[int, Steps]]:
    """Feed each of ``streams`` (int64, shape ``(n,)``) from an empty cache; its index and its steps, in their order.

    Args:
        first: streams before this one are left out.
        start: of stream ``first``, so many NLLs are left out.
        trace: takes note of what is evicted, of a single stream.

    Raises:
        UserError: as :meth:`Engine.run`.
    """
    if isinstance(engine, Parallel | Captured):
        yield from engine.run_many(plan, streams, first, start, trace)
        return
    for index in range(first, len(streams)):
        for steps in engine.run(plan, streams[index], start if index == first else 0, trace):
            yield index, steps
