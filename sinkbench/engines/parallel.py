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
from sinkbench.engines.chunks import hidden_states, refuses_plan
from sinkbench.engines.compiling import compiled_parts
from sinkbench.engines.head import nll_of
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.positions.detection import check_reach
from sinkbench.strategies import Plan

COMPILE_FROM = 50_000  # tokens: shorter streams end before compilation pays


@dataclass(frozen=True)
class Parallel:
    """Many tokens a forward.

    Attributes:
        chunk: tokens a forward; by default chosen from the free memory.
        compiled: whether parts of the model run compiled, on CUDA; by default where the stream is long enough.
    """

    model: PreTrainedModel
    chunk: int | None = None
    compiled: bool | None = None

    def refuses(self, plan: Plan) -> str | None:
        return "no cache is carried: each token is read afresh" if plan.context is not None else refuses_plan(plan)

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`; chunks lie as they would without ``start``."""
        model = self.model
        tokens = tokens.to(model.device)
        last = len(tokens) - 1
        if plan.dense:
            check_reach(model, last)
        cache = StreamCache(model, plan, trace)
        with compiled_parts(model, last >= COMPILE_FROM if self.compiled is None else self.compiled):
            waiting: Pending | None = None
            for begin, hidden in hidden_states(model, cache, tokens[:last], self.chunk):
                first, end = max(begin, start), begin + len(hidden)
                if end <= start:
                    continue
                nll = nll_of(model, hidden[first - begin :], tokens[first + 1 : end + 1])
                held = bytes_held(plan, cache.itemsize, np.arange(first + 1, end + 1)).tolist()
                begun = Pending(first + 1, nll, held)
                if waiting:  # the device is busy with the next chunk while this one is written down
                    yield waiting.steps()
                waiting = begun
            if waiting:
                yield waiting.steps()


class Pending:
    """NLLs on their way from the device."""

    def __init__(self, first: int, nll: Tensor, kv_cache_bytes: list[int]) -> None:
        self.first, self.kv_cache_bytes, self.vram = first, kv_cache_bytes, vram_allocated()
        self.event = torch.cuda.Event() if nll.is_cuda else None
        self.nll = nll.to("cpu", non_blocking=True) if not self.event else self._copied(nll)

    def _copied(self, nll: Tensor) -> Tensor:
        here = torch.empty(nll.shape, dtype=nll.dtype, pin_memory=True).copy_(nll, non_blocking=True)
        assert self.event is not None
        self.event.record()
        return here

    def steps(self) -> Steps:
        """Wait until they are here."""
        if self.event:
            self.event.synchronize()
        return Steps(self.first, self.nll.tolist(), None, self.vram, self.kv_cache_bytes)
