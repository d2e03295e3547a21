"""No cache at all: each prediction from a forward over the last tokens (StreamingLLM, arXiv 2309.17453, figure 1c)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.engines.parallel import many_a_step
from sinkbench.engines.step import Steps
from sinkbench.engines.stepwise import one_a_step
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Recompute:
    """A fresh forward for every token.

    Attributes:
        batched: whether many windows share a forward; otherwise each has its own, and a latency.
        chunk: half the tokens of a batch of windows; by default chosen from the free memory.
        reference: the plan to diverge from; ``None`` for none.
        until: tokens of a stream that it reads; ``None`` for all.
    """

    model: PreTrainedModel
    batched: bool = False
    chunk: int | None = None
    reference: Plan | None = None
    until: int | None = None

    def refuses(self, plan: Plan) -> str | None:
        return None if plan.context is not None else "a cache is carried from token to token"

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`. Nothing is kept, and so nothing evicted."""
        beside = self.reference, self.until
        if self.batched:
            yield from many_a_step(self.model, plan, tokens, start, None, *beside, self.chunk)
        else:
            yield from one_a_step(self.model, plan, tokens, start, None, *beside)
