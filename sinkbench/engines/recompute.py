"""No cache at all: each prediction from a forward over the last tokens (StreamingLLM, arXiv 2309.17453, figure 1c)."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.engines.chunks import chunk_for
from sinkbench.engines.head import backbone, loss, nll_of
from sinkbench.engines.step import Steps, synchronize, vram_allocated
from sinkbench.errors import UserError
from sinkbench.positions.detection import read_positions
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.positions.reach import shortest_limit
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Recompute:
    """A fresh forward for every token.

    Attributes:
        batched: whether many windows share a forward; otherwise each has its own, and a latency.
        chunk: half the tokens of a batch of windows; by default chosen from the free memory.
    """

    model: PreTrainedModel
    batched: bool = False
    chunk: int | None = None

    def refuses(self, plan: Plan) -> str | None:
        return None if plan.context is not None else "a cache is carried from token to token"

    @torch.inference_mode()
    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`. Nothing is kept, and so nothing evicted."""
        assert plan.context is not None
        tokens, width = tokens.to(self.model.device), plan.context
        with lasting(self.model, width), exact_angles(self.model):
            yield from (self._batches if self.batched else self._each)(width, tokens, start)

    def _each(self, width: int, tokens: Tensor, start: int) -> Iterator[Steps]:
        for t in range(start, len(tokens) - 1):
            synchronize()
            begin = time.perf_counter()
            window = tokens[max(0, t + 1 - width) : t + 1]
            logits = self.model(input_ids=window[None], use_cache=False, logits_to_keep=1).logits[0, -1:]
            nll = loss(logits, tokens[t + 1 : t + 2]).item()
            synchronize()
            yield Steps(t + 1, [nll], time.perf_counter() - begin, vram_allocated(), [0])

    def _limit(self) -> int | None:
        """The length beyond which frequencies change, of a model with rotary positions."""
        try:
            return shortest_limit(read_positions(self.model))
        except UserError:
            return None

    def _batches(self, width: int, tokens: Tensor, start: int) -> Iterator[Steps]:
        """Windows that start with the text share a forward, unless frequencies follow the length of each."""
        last, body, fed = len(tokens) - 1, backbone(self.model), start
        limit = self._limit()
        while fed < min(width, last):
            end = min(width, last) if limit is None or width <= limit else max(fed + 1, min(limit, last))
            hidden = body(input_ids=tokens[None, :end], use_cache=False).last_hidden_state[0, fed:]
            yield _nothing_held(fed + 1, nll_of(self.model, hidden, tokens[fed + 1 : end + 1]))
            fed = end
        if fed >= last:
            return
        windows = tokens[fed + 1 - width : last].unfold(0, width, 1)
        for batch in windows.split(max(1, 2 * (self.chunk or chunk_for(self.model)) // width)):
            hidden = body(input_ids=batch, use_cache=False).last_hidden_state[:, -1]
            nll = nll_of(self.model, hidden, tokens[fed + 1 : fed + 1 + len(batch)])
            yield _nothing_held(fed + 1, nll)
            fed += len(batch)


def _nothing_held(first: int, nll: Tensor) -> Steps:
    return Steps(first, nll.tolist(), None, vram_allocated(), [0] * len(nll))
