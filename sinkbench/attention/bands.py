"""Attention to the recent keys alone, many queries at once: a band.

Token ``t`` sees the keys of the tokens ``oldest(t) .. t`` that lie behind the sinks (:meth:`Policy.oldest`).
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from sinkbench.attention.kernels import kernels
from sinkbench.attention.scores import Scores, softmax
from sinkbench.positions.rotary import wide
from sinkbench.strategies import LayerPlan, Policy

QUERY_BLOCK = 256  # queries that share one slice of the band


def band(
    query: Tensor, key: Tensor, value: Tensor, first: int, begin: int, plan: LayerPlan, scores: Scores
) -> tuple[Tensor, Tensor]:
    """Attention to the recent keys alone.

    Args:
        query: ``(B, H, n, D)``; its row ``i`` is token ``first + i`` of the text.
        key: ``(B, Hkv, m, D)``; its row ``j`` is token ``begin + j``. Sinks are not among them.

    Returns:
        The output ``(B, H, n, D)`` and the logarithm of the softmax's denominator ``(B, H, n)``, float32 or wider;
        zero and -inf for tokens that have no recent key (the sinks themselves).
    """
    n, policy = query.shape[-2], plan.policy
    flash = scores.plain and _flash_takes(query, value)
    kernel = None if flash or key.shape[2] == 0 else kernels("band")
    if kernel is not None and kernel.takes(query, value):
        return kernel.attend(query, key, value, first, begin, plan, scores)
    seeing, end = max(first, begin if begin <= policy.sinks else first), first + n
    if flash and key.shape[2] and (policy.window is None or policy.block == 1):
        skipped = max(0, policy.oldest(first) - begin)
        out, log_sum = _flash_band(query, key[:, :, skipped:], value[:, :, skipped:], policy.recent, scores.scale)
        if seeing > first:
            out[:, :, : seeing - first], log_sum[:, :, : seeing - first] = 0.0, -math.inf
        return out, log_sum
    fused = scores.plain and query.device.type == "cpu" and value.shape[-1] == query.shape[-1]

    def part(a: int, b: int) -> tuple[Tensor, Tensor]:
        low = max(begin, policy.oldest(a))
        rows, keys = slice(a - first, b - first), slice(low - begin, b - begin)
        some = query[:, :, rows], key[:, :, keys], value[:, :, keys]
        if flash:
            return _flash_band(*some, None, scores.scale)
        mask = _mask(policy, a, b, low, query.dtype, query.device)
        if fused:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*some, attn_mask=mask, scale=scores.scale)
        return softmax(_weights(*some[:2], plan, scores, a, low) + mask, some[2])

    stretches = list(_stretches(policy, seeing, end, flash))
    if stretches == [(first, end)]:
        return part(first, end)
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    log_sum = query.new_full(query.shape[:3], -math.inf, dtype=wide(query.dtype))
    for a, b in stretches:
        rows = slice(a - first, b - first)
        out[:, :, rows], log_sum[:, :, rows] = part(a, b)
    return out, log_sum


def _stretches(policy: Policy, a: int, end: int, flash: bool) -> Iterator[tuple[int, int]]:
    """Queries ``a .. end`` in stretches that share a slice of the band."""
    while a < end:
        b = min(a + QUERY_BLOCK, end)
        if flash and policy.window is not None:  # it knows no other band: stretches that all see the same oldest key
            over = max(0, a - policy.window)
            b = min(end, policy.window + -(-over // policy.block) * policy.block + 1)
        yield a, b
        a = b


def _flash_takes(query: Tensor, value: Tensor) -> bool:
    dim = query.shape[-1]
    return query.is_cuda and query.dtype.itemsize == 2 and value.shape[-1] == dim and dim % 8 == 0 and dim <= 256


def _flash_band(query: Tensor, key: Tensor, value: Tensor, recent: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """The band by FlashAttention 2 as torch carries it, which skips what the band excludes.

    Its mask is aligned to the last query and the last key, as ours is. Of queries before the first key it says nothing.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    left = -1 if recent is None else recent
    sizes = (None, None, q.shape[1], k.shape[1])
    got = torch.ops.aten._flash_attention_forward(
        *(q, k, v), *sizes, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=0
    )
    return got[0].transpose(1, 2), got[1]


def _mask(policy: Policy, a: int, b: int, low: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0 where query ``a + i`` sees key ``low + j``, else -inf; ``(b - a, b - low)``."""
    if policy.window is not None and policy.block > 1:
        return _stepped_mask(policy, a, b, low, dtype, device)
    return _band_mask(b - a, a - low, policy.recent, dtype, device)


@lru_cache(maxsize=64)
def _band_mask(rows: int, lead: int, recent: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(rows, lead + rows)``: 0 where row ``i`` may see column ``j``, its own column being ``lead + i``; else -inf."""
    distance = lead + torch.arange(rows, device=device)[:, None] - torch.arange(lead + rows, device=device)[None]
    seen = distance >= 0 if recent is None else (distance >= 0) & (distance <= recent)
    return torch.zeros(distance.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def _stepped_mask(policy: Policy, a: int, b: int, low: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    t, j = torch.arange(a, b, device=device)[:, None], torch.arange(low, b, device=device)[None]
    seen = (j <= t) & (j >= policy.oldest(t))
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -math.inf)


def _weights(query: Tensor, key: Tensor, plan: LayerPlan, scores: Scores, a: int, low: int) -> Tensor:
    """Scores of queries from token ``a`` on with recent keys from token ``low`` on, unmasked."""
    weights = scores.of(query, key)
    t = torch.arange(a, a + query.shape[-2], device=query.device)[:, None]
    j = torch.arange(low, low + key.shape[-2], device=query.device)[None]
    bias = scores.bias(plan, t, j, j - plan.policy.dropped(t), low + key.shape[-2])
    return weights if bias is None else weights + bias
