"""What a cache weighs: bytes of keys and values, in one place for every engine, the estimate and the record."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sinkbench.strategies import LayerPlan, Plan


def bytes_a_token(layer: LayerPlan, itemsize: int) -> float:
    """Bytes that the key and the value of one token occupy here, where they lie decoded, in whatever format.

    ``itemsize`` is that of the model's dtype.
    """
    return 2 * layer.sizes.kv_heads * layer.sizes.head_dim * itemsize


def bytes_held(plan: Plan, itemsize: int, fed: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Bytes that all layers hold after each of these numbers of tokens, int64, in the shape of ``fed``.

    They are those of the format, scales included.
    """
    counts = np.asarray(fed, dtype=np.int64)
    total = np.zeros(counts.shape)
    if plan.context is None:
        groups = Counter((layer.policy, layer.format, layer.sizes) for layer in plan.kept)
        for (policy, stored, sizes), layers in groups.items():
            total += layers * sizes.kv_heads * stored.bytes_of(policy.held(counts), sizes.head_dim, itemsize)
    return np.rint(total).astype(np.int64)
