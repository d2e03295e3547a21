"""What a cache weighs: bytes of keys and values, in one place for every engine, the estimate and the record."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sinkbench.strategies import LayerPlan, Plan


def bytes_a_token(layer: LayerPlan, itemsize: int) -> float:
    """Bytes of the key and the value of one token, scales included; ``itemsize`` is that of the model's dtype."""
    return 2 * layer.sizes.kv_heads * layer.format.bytes_of(layer.sizes.head_dim, itemsize)


def bytes_held(plan: Plan, itemsize: int, fed: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Bytes that all layers hold after each of these numbers of tokens, int64, in the shape of ``fed``."""
    counts = np.asarray(fed, dtype=np.int64)
    total = np.zeros(counts.shape)
    if plan.context is None:
        groups = Counter((layer.policy, bytes_a_token(layer, itemsize)) for layer in plan.kept)
        for (policy, size), layers in groups.items():
            total += layers * size * policy.held(counts)
    return np.rint(total).astype(np.int64)
