"""Attention of a layer whose entries go by a score, and what it gave to each of them.

One query attends to all that is held, and one entry goes. Of a whole chunk, the scores of all queries with all columns
are formed at once; a scan over them finds at which token each column dies; a softmax over those that are alive at each
query, and a product with the values, end it (docs/parallel.md).
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sinkbench.attention.kernels import kernels
from sinkbench.attention.rows import Rows
from sinkbench.attention.scan import scan
from sinkbench.attention.scores import Scores, shares_of
from sinkbench.cache.columns import Columns
from sinkbench.cache.scored import ScoredLayer
from sinkbench.positions.rotary import wide


def attend(layer: ScoredLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """``(B, H, n, D)`` for the queries of the newest tokens of ``layer``, just after its update; then entries go.

    Args:
        key: what the update answered with, ``(B, Hkv, m, D)``; ``value`` likewise.
    """
    return attend_one(layer, query, key, value, scores) if layer.columns is None else attend_many(layer, query, scores)


def attend_one(layer: ScoredLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """``(B, H, 1, D)`` for one query; then one entry goes."""
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    if not layer.looks and scores.plain and scores.extra is None:
        out = scaled_dot_product_attention(query, key, value, scale=scores.scale, enable_gqa=groups > 1)
        layer.evict(None)
        return out
    weights = scores.of(query, key)[:, :, 0]  # (B, H, m)
    if scores.alibi is not None:
        weights = weights + _terms(layer, scores.alibi.slopes.to(weights.dtype), groups)
    extra = None if scores.extra is None else scores.extra.to(weights.dtype)[None]
    shares = shares_of(weights, extra).view(batch, key.shape[1], groups, -1)
    out = torch.matmul(shares.to(value.dtype), value)
    layer.evict(shares)
    return out.reshape(batch, heads, 1, -1)


def _terms(layer: ScoredLayer, slopes: Tensor, groups: int) -> Tensor:
    """What ALiBi adds to the score of each entry, up to a constant a query: slope times distance, ``(B, H, m)``."""
    if layer.plan.positions == "cache":
        distance = layer.ranks[:, :, : layer.present] - (layer.present - 1)
    else:
        distance = layer.tokens[:, :, : layer.present] - (layer.seen - 1)
    return slopes[None, :, None] * distance.repeat_interleave(groups, dim=1)


def attend_many(layer: ScoredLayer, query: Tensor, scores: Scores) -> Tensor:
    """``(B, H, n, D)`` for the queries of a chunk."""
    columns, n = layer.columns, query.shape[2]
    assert columns is not None
    extra = None if scores.extra is None else scores.extra.to(wide(query.dtype)).view(columns.keys.shape[1], -1)
    rows = Rows.of(layer, n, lambda: _weights(layer, query, scores), extra)
    died = scan(rows)
    fused = _fused(query, columns, scores)
    if fused is not None:
        out = fused.attend(query, columns.keys, columns.values, died, columns.held, scores.scale, scores.extra)
        layer.keep(died)
        return out
    alive = rows.scores.masked_fill_(~seen_by(died, columns.held, n)[:, :, None], -math.inf)
    shares = shares_of(alive, None if extra is None else extra[..., None])
    out = torch.matmul(shares.to(columns.values.dtype).flatten(2, 3), columns.values)
    layer.keep(died)
    return out.view(*query.shape[:3], -1)


def _weights(layer: ScoredLayer, query: Tensor, scores: Scores) -> Tensor:
    """Scores of all queries with all columns, ``(B, Hkv, G, n, m)``, ALiBi's terms among them."""
    columns, n = layer.columns, query.shape[2]
    assert columns is not None
    weights = scores.of(query, columns.keys).unflatten(1, (columns.keys.shape[1], -1))
    if scores.alibi is None:
        return weights
    now = torch.arange(layer.seen - n, layer.seen, device=query.device)
    distance = columns.tokens[:, :, None, None] - now[:, None]
    return weights + scores.alibi.slopes.to(weights.dtype).view(-1, weights.shape[2], 1, 1) * distance


def _fused(query: Tensor, columns: Columns, scores: Scores) -> ModuleType | None:
    """The kernel that forms scores, softmax and output in one pass; ``None`` where there is none for these."""
    same = columns.values.shape[-1] == query.shape[-1]
    if not query.is_cuda or query.dtype == torch.float64 or not scores.plain or not same:
        return None
    return kernels("alive")


def seen_by(died: Tensor, held: int, n: int) -> Tensor:
    """Whether each of ``n`` queries attends to each column, ``(B, H, n, m)``: it has come, and is not dead."""
    i = torch.arange(n, device=died.device)[:, None]
    come = torch.arange(-held, n, device=died.device)[None] <= i
    return come & (died[:, :, None] >= i)
