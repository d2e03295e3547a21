"""What is kept: the cache strategies, one small file each.

A strategy is a function of the two sizes the user gives, answering with a :class:`Keep`. To add one,
write its file and add one line to :data:`STRATEGIES`.
"""

from collections.abc import Callable

from sinkbench.errors import UserError
from sinkbench.strategies.attention_sinks import attention_sinks
from sinkbench.strategies.policy import Keep
from sinkbench.strategies.recompute import recompute
from sinkbench.strategies.transformers import transformers
from sinkbench.strategies.windowed import windowed

__all__ = ["STRATEGIES", "Keep", "resolve"]

STRATEGIES: dict[str, Callable[[int, int], Keep]] = {
    "attention_sinks": attention_sinks,
    "transformers": transformers,
    "windowed": windowed,
    "recompute": recompute,
}


def resolve(name: str, window_size: int, attention_sink_size: int) -> Keep:
    """The :class:`Keep` of strategy ``name`` with these sizes.

    Raises:
        UserError: an unknown strategy, or sizes that leave no window.
    """
    if name not in STRATEGIES:
        raise UserError(f"unknown strategy {name!r}; there are {', '.join(sorted(STRATEGIES))}")
    return STRATEGIES[name](window_size, attention_sink_size)
