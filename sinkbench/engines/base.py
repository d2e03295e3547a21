"""What an engine is: a way of running a stream through a model, under the plans that it does not refuse."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from sinkbench.cache.trace import Trace
from sinkbench.engines.step import Steps
from sinkbench.strategies import Plan


class Engine(Protocol):
    """A way of running a stream, made for one model."""

    def refuses(self, plan: Plan) -> str | None:
        """Why this engine cannot run ``plan`` exactly, for people, with what to do instead; ``None`` where it can."""

    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """Feed ``tokens`` (int64, shape ``(n,)``); yield the NLLs of the next ones, the first ``start`` left out.

        Args:
            trace: takes note of what is evicted, from the first token on, whatever ``start`` is.

        Raises:
            UserError: the model's positions cannot stream, or the like.
        """
