"""Attention of a layer whose entries go by a score: one query to all that is held, and what it gave to each."""

import torch
from torch import Tensor

from sinkbench.attention.scores import Scores
from sinkbench.cache.scored import ScoredLayer


def attend(layer: ScoredLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """``(B, H, 1, D)`` for the query of the newest token of ``layer``, just after its update; then one entry goes.

    Args:
        key: what the update answered with, ``(B, Hkv, m, D)``; ``value`` likewise.
    """
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    weights = scores.of(query, key)[:, :, 0]  # (B, H, m)
    if scores.alibi is not None:
        weights = weights + _terms(layer, scores.alibi.slopes.to(weights.dtype), groups)
    total = weights.logsumexp(-1, keepdim=True)
    if scores.extra is not None:
        total = torch.logaddexp(total, scores.extra.to(total.dtype)[None, :, None])
    shares = torch.exp(weights - total).view(batch, key.shape[1], groups, -1)
    out = torch.matmul(shares.to(value.dtype), value)
    layer.evict(shares)
    return out.reshape(batch, heads, 1, -1)


def _terms(layer: ScoredLayer, slopes: Tensor, groups: int) -> Tensor:
    """What ALiBi adds to the score of each entry, up to a constant a query: slope times distance, ``(B, H, m)``."""
    if layer.plan.positions == "cache":
        distance = layer.ranks() - (layer.present - 1)
    else:
        distance = layer.tokens[:, :, : layer.present] - (layer.seen - 1)
    return slopes[None, :, None] * distance.repeat_interleave(groups, dim=1)
