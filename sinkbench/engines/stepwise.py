"""Token by token, as a streaming deployment runs: one forward of the unmodified model a token."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.engines.divergence import divergence
from sinkbench.engines.loss import loss
from sinkbench.engines.predictor import Predictor
from sinkbench.engines.step import Steps, synchronize, vram_allocated
from sinkbench.positions.bare import device_of
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Stepwise:
    """The plain way: any model, any plan that carries a cache.

    Attributes:
        reference: the plan to diverge from; ``None`` for none.
        until: tokens of a stream that it reads; ``None`` for all. Behind them nothing is measured against it.
    """

    model: PreTrainedModel
    reference: Plan | None = None
    until: int | None = None

    def refuses(self, plan: Plan) -> str | None:
        return None if plan.context is None else "no cache is carried: each token is read afresh"

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`. The latency of a step spans the forward and the loss, from token to number."""
        yield from one_a_step(self.model, plan, tokens, start, trace, self.reference, self.until)


def one_a_step(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    start: int,
    trace: Trace | None,
    reference: Plan | None,
    until: int | None = None,
) -> Iterator[Steps]:
    """As :meth:`Engine.run`, a forward a token; a reference has another, which is no part of the latency."""
    own = Predictor(model, plan, tokens, start, trace)
    end = len(tokens) - 1 if until is None else until
    beside = None if reference is None or start >= end else Predictor(model, reference, tokens[: end + 1], start)
    tokens = tokens.to(device_of(model))
    turns = beside is not None  # two predictors take turns
    longest = own.longest if beside is None else max(own.longest, beside.longest)
    with lasting(model, longest), exact_angles(model), nullcontext() if turns else own.reading():
        for t in range(start, len(tokens) - 1):
            if t == end:
                beside = None  # and its cache
            label = tokens[t + 1 : t + 2]
            with own.reading() if turns else nullcontext():
                synchronize()
                begin = time.perf_counter()
                logits = own.logits(t)
                nll = loss(logits, label).item()
                synchronize()
                latency = time.perf_counter() - begin
            columns = {}
            if beside is not None:
                with beside.reading():
                    found = divergence(logits, beside.logits(t), label)
                columns = {name: values.tolist() for name, values in found.items()}
            yield Steps(t + 1, [nll], latency, vram_allocated(), [own.nbytes], columns)
