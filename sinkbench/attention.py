"""Attention for many tokens at once under a strategy: a band of recent keys, and the sinks, in one softmax.

Token ``t`` of a stream with window ``W = S + R`` attends to the window keys ``max(S, t - R) .. t`` at their distance
in the text, and to the sinks ``0 .. S - 1`` as if it stood at position ``min(t, W)``: its query is turned by
``min(t, W) - t`` for them. Each part gives an output and the logarithm of its softmax's denominator; the two
are folded into the softmax over both (see docs/parallel.md).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench.adapters import adapted
from sinkbench.cache import KeptLayer, StreamCache
from sinkbench.families import family_of
from sinkbench.positions import Alibi
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
        UserError: the attention of ``model`` can neither be replaced through transformers' registry nor is there an
            adapter for it.
    """
    terms = family_of(model).alibi
    alibi = terms(model) if terms else None
    attend = _attend_for(cache, alibi)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    name = f"sinkbench_{id(cache)}"
    for layer in cache.kept:
        layer.apart = True
    try:
        ALL_ATTENTION_FUNCTIONS.register(name, _registered(attend, capped="sdpa" not in before.values()))
        for config in configs.values():
            # a name without a mask function: transformers then builds no mask, the band is ours
            config._attn_implementation = name
        with adapted(model, attend):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)
        for layer in cache.kept:
            layer.apart = False


Attend = Callable[..., Tensor]


def _attend_for(cache: StreamCache, alibi: Alibi | None) -> Attend:
    turns: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: object) -> Tensor:
        """Answers with ``(B, H, n, D)`` for queries ``(B, H, n, D)`` of layer ``index``, just after its update."""
        layer = cache.layers[index]
        assert isinstance(layer, KeptLayer)
        table = alibi.table(_table_length(layer, key)) if alibi else None
        return _attend(layer, query, key, value, Scores(scale, alibi=table, **special), turns)

    return attend


def _table_length(layer: KeptLayer, key: Tensor) -> int:
    window = layer.keep.window
    return key.shape[-2] if window is None else max(window + 1, min(key.shape[-2], window + 1))


def _registered(attend: Attend, capped: bool) -> Callable[..., tuple[Tensor, None]]:
    """``attend`` with the signature of transformers' attention registry.

    Soft caps are left out where the model's own implementation leaves them out, as sdpa does.
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(module.layer_idx, query, key, value, scale, softcap=softcap if capped else None, extra=s_aux)
        return out.transpose(1, 2).contiguous(), None

    return forward


def _attend(
    layer: KeptLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    turns: dict[tuple[int, int, int], tuple[Tensor, Tensor]],
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
        turned = query
        if layer.rope is not None and keep.window is not None and layer.seen > keep.window + 1:
            position = layer.end - n + layer.offset
            at = (id(layer.rope), first, position)
            if at not in turns:
                turns.clear()
                t = torch.arange(first, first + n, device=query.device)
                turns[at] = layer.rope.turn(t.clamp_max(keep.window) - (position + t - first))
            turned = layer.rope.apply(query, *turns[at])
        out, log_sum = _fold(out, log_sum, *_sinks(turned, sink_keys, sink_values, first, scores))
    if scores.extra is not None:
        extra = scores.extra.float()[None, :, None]
        out = out * torch.exp(log_sum - torch.logaddexp(log_sum, extra))[..., None].to(out.dtype)
    return out


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
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    log_sum = query.new_full(query.shape[:3], -math.inf, dtype=torch.float32)
    fused = scores.plain and query.device.type == "cpu" and value.shape[-1] == query.shape[-1]
    a = max(first, begin if begin <= keep.sinks else first)
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
