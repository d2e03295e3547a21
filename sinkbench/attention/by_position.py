"""Attention of a layer whose entries go by position: a band of recent keys, and the sinks, in one softmax.

Token ``t`` of a stream attends to the recent keys at their distance in the text. It meets the sinks where it stands
itself: in the cache at position ``held(t)``, so that its query is turned by ``held(t) - t`` for them; in the text at
``t``. Each part gives an output and the logarithm of its softmax's denominator; the two are folded into the softmax
over both (docs/parallel.md).
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sinkbench.attention.bands import band
from sinkbench.attention.kernels.fold import fold_sinks, triton
from sinkbench.attention.scores import Scores, fold, products_of, softmax
from sinkbench.cache.strip import StripLayer
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation


@dataclass(frozen=True)
class Shared:
    """What layers that are alike need alike in a forward; the first of them finds it.

    Attributes:
        rotations: of queries for sinks.
        terms: what ALiBi adds to the scores of a single query, ``(H, 1, m)``.
    """

    rotations: dict[tuple[int, ...], Rotation] = field(default_factory=dict)
    terms: dict[tuple[int, ...], Tensor] = field(default_factory=dict)


def attend(layer: StripLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores, shared: Shared) -> Tensor:
    """``(B, H, n, D)`` for the queries of the newest tokens of ``layer``, just after its update.

    Args:
        key: what the update answered with, ``(B, Hkv, m, D)``; ``value`` likewise.
        shared: with the other layers.
    """
    n, policy = query.shape[-2], layer.policy
    first, begin = layer.seen - n, layer.seen - key.shape[-2]  # text indices of the first query and the first key
    if n == 1 and scores.alibi is not None and scores.softcap is None:
        return _attend_once(layer, query, key, value, scores, shared.terms)
    count = min(policy.sinks, layer.seen)
    if begin == 0:
        sink_keys, sink_values = key[:, :, :count], value[:, :, :count]
        key, value, begin = key[:, :, count:], value[:, :, count:], count
    else:
        assert layer.sinks is not None
        sink_keys, sink_values = layer.sinks.keys, layer.sinks.values
    out, log_sum = band(query, key, value, first, begin, layer.plan, scores)
    if count:
        rotation = _for_sinks(layer, query, shared.rotations)
        kernel = triton is not None and query.is_cuda and query.dtype != torch.float64  # it computes in float32
        fused = kernel and scores.plain and scores.extra is None
        causal = max(0, count - first)  # the sinks themselves do not see all sinks
        if fused:
            rest = slice(causal, None)
            fold_sinks(
                *(query[:, :, rest], out[:, :, rest], log_sum[:, :, rest], sink_keys, sink_values),
                *(rotation.rows(rest), scores.scale),
            )
        if not fused or causal:
            rows = slice(causal if fused else n)
            turned = rotation.rows(rows)(query[:, :, rows])
            part = sinks_alone(layer, turned, sink_keys, sink_values, first, scores)
            folded, total = fold(out[:, :, rows], log_sum[:, :, rows], *part)
            out[:, :, rows], log_sum[:, :, rows] = folded, total
    if scores.extra is not None:
        extra = scores.extra.to(log_sum.dtype)[None, :, None]
        out = out * torch.exp(log_sum - torch.logaddexp(log_sum, extra))[..., None].to(out.dtype)
    return out


def _attend_once(
    layer: StripLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores, shared: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """``(B, H, 1, D)`` for the newest token of a model with ALiBi: sinks laid before the window, in one softmax.

    Nothing turns there, so that a step launches little more than the model's own attention would.
    """
    m = key.shape[-2]
    count = 0 if m == layer.seen else layer.policy.sinks
    if count:
        key, value = layer.with_sinks(m)
    products = products_of(query.view(len(query), key.shape[1], -1, query.shape[-1]), key)
    terms = _terms_once(layer, m, count, scores, products.dtype, shared)
    weights = torch.add(terms, products.view(*query.shape[:-1], m + count), alpha=scores.scale)
    out = torch.matmul(weights.softmax(-1).to(value.dtype).view(*products.shape[:3], m + count), value)
    return out.view(*query.shape[:-1], -1)


def _terms_once(
    layer: StripLayer, m: int, count: int, scores: Scores, dtype: torch.dtype, shared: dict[tuple[int, ...], Tensor]
) -> Tensor:
    """What ALiBi adds for the newest token to ``count`` sinks and the last ``m`` entries, ``(H, 1, count + m)``."""
    assert scores.alibi is not None
    gone = layer.seen - m - count if layer.plan.gap else 0  # between sinks and window, in the text
    key = (layer.seen, m, count, gone)
    if key not in shared:
        if any(known[0] != layer.seen for known in shared):
            shared.clear()  # of an earlier forward
        if layer.plan.gap:
            distance = torch.arange(1 - m - count, 1, dtype=dtype, device=layer.device)
            distance[:count] -= gone
            shared[key] = scores.alibi.slopes.to(dtype)[:, None, None] * distance
        else:
            shared[key] = scores.alibi.table(m + count)[:, None].to(dtype)
    return shared[key]


def _for_sinks(layer: StripLayer, query: Tensor, rotations: dict[tuple[int, ...], Rotation]) -> Rotation:
    """From where the last queries of ``layer`` stand to where they meet the sinks; shared by layers that turn alike."""
    n, policy = query.shape[-2], layer.policy
    first, position = layer.seen - n, layer.end - n + layer.offset
    in_cache = not layer.plan.gap
    key = (id(layer.rope), first, position, policy.window or 0 if in_cache else -1, policy.block)
    if key not in rotations:
        if any(known[1:3] != key[1:3] for known in rotations):
            rotations.clear()  # of an earlier forward
        still = Rotation.still(layer.rope, query.shape[-1], query.device, query.dtype)
        t = torch.arange(first, first + n, device=query.device)
        met = policy.held(t) if in_cache else t
        by = met - (position + t - first)
        rotations[key] = still.by(layer.rope or Rope(torch.zeros(0, device=query.device)), by)
    return rotations[key]


def sinks_alone(
    layer: StripLayer, query: Tensor, keys: Tensor, values: Tensor, first: int, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention to the sinks alone, for queries that have been turned for them; as :func:`softmax` answers."""
    weights = scores.of(query, keys)
    n, count = weights.shape[-2:]
    t = torch.arange(first, first + n, device=query.device)[:, None]
    j = torch.arange(count, device=query.device)[None]
    bias = scores.bias(layer.plan, t, j, j, layer.seen)
    if bias is not None:
        weights = weights + bias
    if first < count:
        weights = weights.masked_fill(j > t, -math.inf)
    return softmax(weights, values)
