"""Attention for many tokens at once under a strategy: a band of recent keys, and the sinks, in one softmax.

Token ``t`` of a stream with window ``W = S + R`` attends to the window keys ``max(S, t - R) .. t`` at their distance
in the text, and to the sinks ``0 .. S - 1`` as if it stood at position ``min(t, W)``: its query is turned by
``min(t, W) - t`` for them. Each part gives an output and the logarithm of its softmax's denominator; the two
are folded into the softmax over both (see docs/parallel.md).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.kernels.fold import fold_sinks, triton
from sinkbench.attention.redirection import Attend, redirected
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import StripLayer
from sinkbench.positions.alibi import Alibi
from sinkbench.positions.families import family_of
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Keep

QUERY_BLOCK = 256  # queries that share one slice of the band


@dataclass(frozen=True)
class Scores:
    """How a model turns products into scores: ``cap(scale * q.k) + bias``, and a logit that joins each softmax.

    Attributes:
        scale: of the products.
        softcap: Gemma 2's bound, ``softcap * tanh(score / softcap)``.
        alibi: terms by position inside the cache, shape ``(heads, positions)``.
        extra: gpt-oss' learned logit a head, shape ``(heads,)``.
    """

    scale: float
    softcap: float | None = None
    alibi: Tensor | None = None
    extra: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel can compute them."""
        return self.softcap is None and self.alibi is None

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """Capped scores ``(B, H, n, m)`` in float32, without bias."""
        batch, heads, n, dim = query.shape
        groups = query.reshape(batch, key.shape[1], -1, dim)
        scores = torch.matmul(groups, key.transpose(-1, -2)).float().view(batch, heads, n, -1) * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


@contextmanager
def attending(model: PreTrainedModel, cache: StreamCache) -> Iterator[None]:
    """Within this context, forwards of ``model`` with ``cache`` may feed many tokens at once.

    Raises:
        UserError: the attention of ``model`` cannot be redirected.
    """
    terms = family_of(model).alibi
    attend = _attend_for(cache, terms(model) if terms else None)
    for layer in cache.kept:
        layer.sinks_in_attention = True
    try:
        with redirected(model, attend):
            yield
    finally:
        for layer in cache.kept:
            layer.sinks_in_attention = False


def _attend_for(cache: StreamCache, alibi: Alibi | None) -> Attend:
    turns: dict[tuple[int, int, int], Rotation] = {}

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: object) -> Tensor:
        """Answers with ``(B, H, n, D)`` for queries ``(B, H, n, D)`` of layer ``index``, just after its update."""
        layer = cache.layers[index]
        assert isinstance(layer, StripLayer)
        table = alibi.table(_table_length(layer, key)) if alibi else None
        return _attend(layer, query, key, value, Scores(scale, alibi=table, **special), turns)

    return attend


def _table_length(layer: StripLayer, key: Tensor) -> int:
    window = layer.keep.window
    return key.shape[-2] if window is None else max(window + 1, min(key.shape[-2], window + 1))


def _attend(
    layer: StripLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    turns: dict[tuple[int, int, int], Rotation],
) -> Tensor:
    n, keep = query.shape[-2], layer.keep
    first, begin = layer.seen - n, layer.seen - key.shape[-2]  # text indices of the first query and the first key
    count = min(keep.sinks, layer.seen)
    if begin == 0:
        sink_keys, sink_values = key[:, :, :count], value[:, :, :count]
        key, value, begin = key[:, :, count:], value[:, :, count:], count
    else:
        assert layer.sinks is not None
        sink_keys, sink_values = layer.sinks.keys, layer.sinks.values
    out, log_sum = band(query, key, value, first, begin, keep, scores)
    if count:
        turn = _turn_for_sinks(layer, query, turns)
        fused = scores.plain and scores.extra is None and triton is not None and query.is_cuda
        causal = max(0, count - first)  # the sinks themselves do not see all sinks
        if fused:
            rest = slice(causal, None)
            fold_sinks(
                *(query[:, :, rest], out[:, :, rest], log_sum[:, :, rest], sink_keys, sink_values),
                *(turn.rows(rest), scores.scale),
            )
        if not fused or causal:
            rows = slice(causal if fused else n)
            turned = turn.rows(rows)(query[:, :, rows])
            part = _sinks(turned, sink_keys, sink_values, first, scores)
            folded, total = _fold(out[:, :, rows], log_sum[:, :, rows], *part)
            out[:, :, rows], log_sum[:, :, rows] = folded, total
    if scores.extra is not None:
        extra = scores.extra.float()[None, :, None]
        out = out * torch.exp(log_sum - torch.logaddexp(log_sum, extra))[..., None].to(out.dtype)
    return out


def _turn_for_sinks(layer: StripLayer, query: Tensor, turns: dict[tuple[int, int, int], Rotation]) -> Rotation:
    """From where the last queries of ``layer`` stand to where they meet the sinks; shared by layers that turn alike."""
    n, dim, window = query.shape[-2], query.shape[-1], layer.keep.window
    first, position = layer.seen - n, layer.end - n + layer.offset
    key = (id(layer.rope), first, position)
    if key not in turns:
        turns.clear()
        turn = Rotation.still(layer.rope, dim, query.device)
        t = torch.arange(first, first + n, device=query.device)
        met = t if window is None else t.clamp_max(window)
        by = met - (position + t - first)
        turns[key] = turn.by(layer.rope or Rope(torch.zeros(0, device=query.device)), by)
    return turns[key]


def band(
    query: Tensor, key: Tensor, value: Tensor, first: int, begin: int, keep: Keep, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention to the recent keys alone.

    Args:
        query: ``(B, H, n, D)``; its row ``i`` is token ``first + i`` of the text.
        key: ``(B, Hkv, m, D)``; its row ``j`` is token ``begin + j``. Sinks are not among them.

    Returns:
        The output ``(B, H, n, D)`` and the logarithm of the softmax's denominator ``(B, H, n)``, float32; zero and
        -inf for tokens that have no recent key (the sinks themselves).
    """
    n = query.shape[-2]
    a = max(first, begin if begin <= keep.sinks else first)
    if scores.plain and _flash_takes(query, value) and a < first + n:
        out, log_sum = _flash_band(query, key, value, keep.recent, scores.scale)
        log_sum[:, :, : a - first] = -math.inf  # rows that see no key: FlashAttention answers zeros, and +inf
        return out, log_sum
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    log_sum = query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
    fused = scores.plain and query.device.type == "cpu" and value.shape[-1] == query.shape[-1]
    while a < first + n:
        b = min(a + QUERY_BLOCK, first + n)
        low = begin if keep.recent is None else max(begin, a - keep.recent)
        rows, keys = slice(a - first, b - first), slice(low - begin, b - begin)
        part = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        mask = _band_mask(b - a, a - low, keep.recent, query.dtype, query.device)
        if fused:
            got = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*part, attn_mask=mask, scale=scores.scale)
        else:
            got = _plain_block(*part, mask, scores, _alibi_bias(scores.alibi, a, b, low, keep))
        out[:, :, rows], log_sum[:, :, rows] = got
        a = b
    return out, log_sum


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    dim = query.shape[-1]
    return query.is_cuda and query.dtype != torch.float32 and value.shape[-1] == dim and dim % 8 == 0 and dim <= 256


def _flash_band(query: Tensor, key: Tensor, value: Tensor, recent: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """The band by FlashAttention 2 as torch carries it, which skips what the band excludes.

    Its mask is aligned to the last query and the last key, as ours is.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    left = -1 if recent is None else recent
    sizes = (None, None, q.shape[1], k.shape[1])
    got = torch.ops.aten._flash_attention_forward(
        *(q, k, v), *sizes, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return got[0].transpose(1, 2), got[1]


@lru_cache(maxsize=64)
def _band_mask(rows: int, lead: int, recent: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(rows, lead + rows)``: 0 where row ``i`` may see column ``j``, its own column being ``lead + i``; else -inf."""
    distance = lead + torch.arange(rows, device=device)[:, None] - torch.arange(lead + rows, device=device)[None]
    seen = distance >= 0 if recent is None else (distance >= 0) & (distance <= recent)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def _alibi_bias(table: Tensor | None, a: int, b: int, low: int, keep: Keep) -> Tensor | None:
    """Terms ``(H, b - a, b - low)`` for queries ``a .. b`` and recent keys ``low .. b``, by position in the cache."""
    if table is None:
        return None
    t = torch.arange(a, b, device=table.device)[:, None]
    j = torch.arange(low, b, device=table.device)[None]
    shift = torch.zeros_like(t) if keep.window is None else (t - keep.window).clamp_min(0)
    return table[:, (j - shift).clamp(0, table.shape[1] - 1)]


def _plain_block(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = scores.of(query, key)
    if bias is not None:
        weights = weights + bias
    return _softmax(weights + mask, value)


def _softmax(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-denominator of a softmax over scores ``(B, H, n, m)``."""
    batch, heads, n, m = weights.shape
    log_sum = weights.logsumexp(dim=-1)
    shares = torch.exp(weights - log_sum[..., None]).to(value.dtype).view(batch, value.shape[1], -1, m)
    return torch.matmul(shares, value).view(batch, heads, n, -1), log_sum


def _sinks(query: Tensor, keys: Tensor, values: Tensor, first: int, scores: Scores) -> tuple[Tensor, Tensor]:
    """Attention to the sinks alone, for queries that have been turned for them."""
    weights = scores.of(query, keys)
    n, count = weights.shape[-2:]
    if scores.alibi is not None:
        weights = weights + scores.alibi[:, None, :count]
    if first < count:
        t = torch.arange(first, first + n, device=query.device)[:, None]
        weights = weights.masked_fill(torch.arange(count, device=query.device)[None] > t, -math.inf)
    return _softmax(weights, values)


def _fold(out: Tensor, log_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one softmax, put together."""
    total = torch.logaddexp(log_sum, other_sum)
    mine, others = torch.exp(log_sum - total)[..., None], torch.exp(other_sum - total)[..., None]
    return (out * mine + other * others).to(out.dtype), total
