"""Logits of one token after the other, under one plan."""

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.engines.forward import feeding, longest_of, reading
from sinkbench.engines.prefill import prefilled
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import check_reach
from sinkbench.strategies import Plan


class Predictor:
    """Feeds ``tokens`` one by one behind the first ``start``, which it has read.

    To be used with exact angles, and tables that last for :attr:`longest` positions.

    Raises:
        UserError: the model's positions cannot stream, or the like.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None
    ) -> None:
        if plan.dense:
            check_reach(model, len(tokens) - 1)
        self.model, self.tokens, self.context = model, tokens.to(device_of(model)), plan.context
        self.cache = None if plan.context is not None else prefilled(model, plan, tokens[:start], trace)
        self.feed = None if self.cache is None else feeding(model, self.cache)
        self.longest = (plan.context or 0) if self.cache is None else longest_of(self.cache, len(tokens))

    def reading(self) -> AbstractContextManager[None]:
        """Within this context, and in no other predictor's, :meth:`logits` may be asked for."""
        return nullcontext() if self.cache is None else reading(self.model, self.cache)

    def logits(self, t: int) -> Tensor:
        """``(1, vocabulary)``, of the token after token ``t``."""
        if self.feed is not None:
            return self.feed(self.tokens[t : t + 1]).logits[0, -1:]
        assert self.context is not None
        window = self.tokens[max(0, t + 1 - self.context) : t + 1]
        return self.model(input_ids=window[None], use_cache=False, logits_to_keep=1).logits[0, -1:]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for the next step."""
        return 0 if self.cache is None else self.cache.nbytes
