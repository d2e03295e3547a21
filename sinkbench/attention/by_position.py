"""Attention of a layer whose entries go by position: a band of recent keys, and the sinks, in one softmax.

Token ``t`` of a stream attends to the recent keys at their distance in the text. It meets the sinks where it stands
itself: in the cache at position ``held(t)``, so that its query is turned by ``held(t) - t`` for them; in the text at
``t``. Each part gives an output and the logarithm of its softmax's denominator; the two are folded into the softmax
over both (docs/parallel.md).
"""

import math

import torch
from torch import Tensor

from sinkbench.attention.bands import band
from sinkbench.attention.kernels.fold import fold_sinks, triton
from sinkbench.attention.scores import Scores, fold, softmax
from sinkbench.cache.strip import StripLayer
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation

Rotations = dict[tuple[int, ...], Rotation]


def attend(
    layer: StripLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores, rotations: Rotations
) -> Tensor:
    """``(B, H, n, D)`` for the queries of the newest tokens of ``layer``, just after its update.

    Args:
        key: what the update answered with, ``(B, Hkv, m, D)``; ``value`` likewise.
        rotations: those of queries for sinks, to be shared by layers that turn alike.
    """
    n, policy = query.shape[-2], layer.policy
    first, begin = layer.seen - n, layer.seen - key.shape[-2]  # text indices of the first query and the first key
    if n == 1 and scores.alibi is not None:
        return _attend_once(layer, query, key, value, scores)
    count = min(policy.sinks, layer.seen)
    if begin == 0:
        sink_keys, sink_values = key[:, :, :count], value[:, :, :count]
        key, value, begin = key[:, :, count:], value[:, :, count:], count
    else:
        assert layer.sinks is not None
        sink_keys, sink_values = layer.sinks.keys, layer.sinks.values
    out, log_sum = band(query, key, value, first, begin, layer.plan, scores)
    if count:
        rotation = _for_sinks(layer, query, rotations)
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


def _attend_once(layer: StripLayer, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """``(B, H, 1, D)`` for the newest token of a model with ALiBi: sinks laid before the window, in one softmax.

    Nothing turns there, so that a step launches little more than the model's own attention would.
    """
    assert scores.alibi is not None
    m = key.shape[-2]
    count, gone = (0, 0) if m == layer.seen else (layer.policy.sinks, layer.seen - m - layer.policy.sinks)
    if count:
        key, value = layer.with_sinks(m)
    weights = scores.of(query, key)
    if layer.plan.gap:
        distance = torch.arange(1 - m - count, 1, dtype=weights.dtype, device=weights.device)
        if count:
            distance[:count] -= gone
        weights = weights.addcmul(scores.alibi.slopes.to(weights.dtype)[:, None, None], distance)
    else:
        weights = weights + scores.alibi.table(m + count)[:, None]
    out = torch.matmul(weights.softmax(-1).to(value.dtype).view(len(query), value.shape[1], -1, m + count), value)
    return out.view(*query.shape[:-1], -1)


def _for_sinks(layer: StripLayer, query: Tensor, rotations: Rotations) -> Rotation:
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
