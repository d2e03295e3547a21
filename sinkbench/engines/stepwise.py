"""Token by token, as a streaming deployment runs: one forward of the unmodified model a token."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.engines.forward import one_by_one
from sinkbench.engines.head import loss
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.step import Steps, synchronize, vram_allocated
from sinkbench.positions.detection import check_reach
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Stepwise:
    """The plain way: any model, any plan that carries a cache."""

    model: PreTrainedModel

    def refuses(self, plan: Plan) -> str | None:
        return None if plan.context is None else "no cache is carried: each token is read afresh"

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`. The latency of a step spans the forward and the loss, from token to number."""
        model = self.model
        if plan.dense:
            check_reach(model, len(tokens) - 1)
        cache = prefilled(model, plan, tokens[:start], trace)
        tokens = tokens.to(model.device)
        with one_by_one(model, cache, len(tokens)) as feed:
            for t in range(start, len(tokens) - 1):
                synchronize()
                begin = time.perf_counter()
                logits = feed(tokens[t : t + 1]).logits[0, -1:]
                nll = loss(logits, tokens[t + 1 : t + 2]).item()
                synchronize()
                latency = time.perf_counter() - begin
                yield Steps(t + 1, [nll], latency, vram_allocated(), [cache.nbytes])
