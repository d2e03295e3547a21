"""What is kept: the cache strategies, one small file each.

To add one, write its file and add one line to :data:`sinkbench.strategies.registry.BUILTIN`; one of your own needs no
line there (docs/strategies.md).
"""

from sinkbench.strategies.base import Eviction, Held, Strategy
from sinkbench.strategies.plan import LayerPlan, LayerSizes, Plan
from sinkbench.strategies.policy import Policy
from sinkbench.strategies.registry import Chosen, choose, find
from sinkbench.validation import Count, Flag, Text, Whole

__all__ = [
    "Chosen",
    "Count",
    "Eviction",
    "Flag",
    "Held",
    "LayerPlan",
    "LayerSizes",
    "Plan",
    "Policy",
    "Strategy",
    "Text",
    "Whole",
    "choose",
    "find",
]
