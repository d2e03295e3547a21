"""Many tokens a forward, with the NLLs of the stepwise engine.

The stream is read in chunks; between chunks the cache carries what the plan keeps, so memory does not depend
on the length of the stream (for dense attention it grows by the cache alone).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.held import bytes_held
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.trace import Trace
from sinkbench.engines.chunks import chunk_for, pieces, refuses_plan
from sinkbench.engines.compiling import compiled_parts
from sinkbench.engines.divergence import Measured
from sinkbench.engines.fresh import fresh_pieces
from sinkbench.engines.head import measured
from sinkbench.engines.pieces import Pieces, together
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.positions.detection import check_reach
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.strategies import Plan

COMPILE_FROM = 50_000  # tokens: shorter streams end before compilation pays


@dataclass(frozen=True)
class Parallel:
    """Many tokens a forward.

    Attributes:
        chunk: tokens a forward; by default chosen from the free memory.
        compiled: whether parts of the model run compiled, on CUDA; by default where the stream is long enough.
        reference: the plan to diverge from; ``None`` for none.
    """

    model: PreTrainedModel
    chunk: int | None = None
    compiled: bool | None = None
    reference: Plan | None = None

    def refuses(self, plan: Plan) -> str | None:
        return "no cache is carried: each token is read afresh" if plan.context is not None else refuses_plan(plan)

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`; chunks lie as they would without ``start``."""
        long = len(tokens) > COMPILE_FROM
        with compiled_parts(self.model, long if self.compiled is None else self.compiled):
            yield from many_a_step(self.model, plan, tokens, start, trace, self.reference, self.chunk)


def many_a_step(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    start: int,
    trace: Trace | None,
    reference: Plan | None,
    chunk: int | None,
) -> Iterator[Steps]:
    """As :meth:`Engine.run`, many tokens a forward; where there is a ``reference``, each has its own forwards."""
    tokens = tokens.to(model.device)
    if reference is not None and chunk is None:  # one choice for both: a plan is at no distance from itself
        chunk = min(chunk_for(model, plan), chunk_for(model, reference))
    own = _pieces(model, plan, tokens[:-1], start, chunk, trace)
    beside = None if reference is None else _pieces(model, reference, tokens[:-1], start, chunk)
    with lasting(model, own.longest if beside is None else max(own.longest, beside.longest)), exact_angles(model):
        waiting: Pending | None = None
        read = ((*piece, None) for piece in own.behind(start))
        for first, hidden, other in read if beside is None else together(own.behind(start), beside.behind(start)):
            end = first + len(hidden)
            found = measured(model, hidden, tokens[first + 1 : end + 1], other)
            begun = Pending(first + 1, found, _held(plan, model, first + 1, end + 1))
            if waiting:  # the device is busy with the next chunk while this one is written down
                yield waiting.steps()
            waiting = begun
        if waiting:
            yield waiting.steps()


def _pieces(
    model: PreTrainedModel, plan: Plan, tokens: Tensor, start: int, chunk: int | None, trace: Trace | None = None
) -> Pieces:
    if plan.context is not None:
        return fresh_pieces(model, plan.context, tokens, start, chunk)
    if plan.dense:
        check_reach(model, len(tokens))
    return pieces(model, StreamCache(model, plan, trace), tokens, chunk)


def _held(plan: Plan, model: PreTrainedModel, first: int, end: int) -> list[int]:
    """Bytes that ``plan`` holds after each of so many tokens."""
    if plan.context is not None:
        return [0] * (end - first)
    return bytes_held(plan, model.dtype.itemsize, np.arange(first, end)).tolist()


class Pending:
    """What was measured, on its way from the device."""

    def __init__(self, first: int, found: Measured, kv_cache_bytes: list[int]) -> None:
        self.first, self.kv_cache_bytes, self.vram = first, kv_cache_bytes, vram_allocated()
        self.event = torch.cuda.Event() if found["nll"].is_cuda else None
        self.found = {name: self._copied(values) if self.event else values.cpu() for name, values in found.items()}
        if self.event:
            self.event.record()

    def _copied(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def steps(self) -> Steps:
        """Wait until it is here."""
        if self.event:
            self.event.synchronize()
        columns = {name: values.tolist() for name, values in self.found.items()}
        return Steps(self.first, columns.pop("nll"), None, self.vram, self.kv_cache_bytes, columns)
