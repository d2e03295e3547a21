"""Attention of a layer whose entries have two versions: as computed while they are new, in few bits afterwards.

At which token an entry passes from the one to the other is known. So a block of queries reads the versions as they are
at its first query, and for the entries that pass within the block the other version too, of which each query takes its
own.
"""

import torch
from torch import Tensor

from sinkbench.attention.scores import Scores, shares_of
from sinkbench.cache.kivi import KiviLayer

QUERY_BLOCK = 256  # queries that read one state of the strip


def attend(layer: KiviLayer, query: Tensor, scores: Scores) -> Tensor:
    """``(B, H, n, D)`` for the queries of the newest tokens of ``layer``, just after its update."""
    n = query.shape[2]
    first = layer.seen - n
    out = query.new_empty(*query.shape[:3], layer.values.shape[-1])
    for a in range(first, layer.seen, QUERY_BLOCK):
        b = min(a + QUERY_BLOCK, layer.seen)
        layer.quantise(a)
        rows = slice(a - first, b - first)
        out[:, :, rows] = _block(layer, query[:, :, rows], scores, a, b)
    return out


def _block(layer: KiviLayer, query: Tensor, scores: Scores, a: int, b: int) -> Tensor:
    """The queries of tokens ``a .. b``, with the strip as it is at ``a``."""
    t = torch.arange(a, b, device=query.device)[:, None]
    j = torch.arange(b, device=query.device)[None]
    keys, values = layer.keys[:, :, :b], layer.values[:, :, :b]
    weights = scores.of(query, keys)
    span, coded = layer.coming_keys(b - 1)
    if coded is not None:
        passed = j[:, span] < layer.format.keys_quantised(t)
        weights[..., span] = torch.where(passed, scores.of(query, coded), weights[..., span])
    bias = scores.bias(layer.plan, t, j, j, b)
    weights = (weights if bias is None else weights + bias).masked_fill_(j > t, -torch.inf)
    extra = None if scores.extra is None else scores.extra.to(weights.dtype)[:, None]
    shares = shares_of(weights, extra).to(values.dtype)
    span, coded = layer.coming_values(b - 1)
    if coded is None:
        return _sums(shares, values)
    passed = j[:, span] < layer.format.values_quantised(t)
    late = shares[..., span] * passed
    shares[..., span] -= late
    return _sums(shares, values) + _sums(late, coded)


def _sums(shares: Tensor, values: Tensor) -> Tensor:
    batch, heads, n, m = shares.shape
    return torch.matmul(shares.reshape(batch, values.shape[1], -1, m), values).view(batch, heads, n, -1)
