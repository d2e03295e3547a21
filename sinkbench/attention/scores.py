"""From products of queries and keys to scores, and from scores to outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.positions.alibi import Alibi
from sinkbench.positions.rotary import wide
from sinkbench.strategies import LayerPlan


@dataclass(frozen=True)
class Scores:
    """How a model turns products into scores: ``cap(scale * q.k) + bias``, and a logit that joins each softmax.

    Attributes:
        scale: of the products.
        softcap: Gemma 2's bound, ``softcap * tanh(score / softcap)``.
        alibi: the terms of a model that adds some by position.
        extra: gpt-oss' learned logit a head, shape ``(heads,)``.
    """

    scale: float
    softcap: float | None = None
    alibi: Alibi | None = None
    extra: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether a fused kernel can compute them."""
        return self.softcap is None and self.alibi is None

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """Capped scores ``(B, H, n, m)`` in float32 or wider, without bias."""
        batch, heads, n, dim = query.shape
        groups = query.reshape(batch, key.shape[1], -1, dim)
        scores = products_of(groups, key).view(batch, heads, n, -1)
        scores = scores * self.scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def bias(self, plan: LayerPlan, t: Tensor, j: Tensor, ranks: Tensor, end: int) -> Tensor | None:
        """The terms that positions add, ``(H, n, m)``; ``None`` where there are none.

        Args:
            t: indices in the text of the queries, ``(n, 1)``.
            j: of the keys, ``(1, m)``.
            ranks: of the keys in the cache, ``(n, m)`` or ``(1, m)``.
            end: no token has an index of this, or beyond.
        """
        if self.alibi is None:
            return None
        if plan.gap:
            # a term that all keys of a query have in common changes nothing: only distances count
            return self.alibi.slopes[:, None, None] * (j - t)
        table = self.alibi.table(end if plan.policy.window is None else plan.policy.window + 1)
        return table[:, ranks.clamp(0, table.shape[1] - 1).expand(t.shape[0], -1)]


def products_of(a: Tensor, b: Tensor) -> Tensor:
    """Products of rows, ``(B, H, n, m)``, in float32 or wider, of ``(B, H, n, D)`` and ``(B, H, m, D)``.

    On CUDA those of half precision are summed and handed on in float32.
    """
    if a.is_cuda and a.element_size() == 2:
        left, right = a.flatten(0, 1), b.transpose(-1, -2).flatten(0, 1)
        return torch.bmm(left, right, out_dtype=torch.float32).view(*a.shape[:3], -1)
    return torch.matmul(a, b.transpose(-1, -2)).to(wide(a.dtype))


def shares_of(weights: Tensor, extra: Tensor | None) -> Tensor:
    """The softmax over scores ``(..., m)``, with a logit that joins each, which broadcasts to ``(...)``."""
    if extra is None:
        return weights.softmax(-1)
    total = torch.logaddexp(weights.logsumexp(-1), extra)
    return torch.exp(weights - total[..., None])


def softmax(weights: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``(B, H, n, D)`` and log-denominator ``(B, H, n)`` of a softmax over scores ``(B, H, n, m)``."""
    batch, heads, n, m = weights.shape
    log_sum = weights.logsumexp(dim=-1)
    shares = torch.exp(weights - log_sum[..., None]).to(value.dtype).view(batch, value.shape[1], -1, m)
    return torch.matmul(shares, value).view(batch, heads, n, -1), log_sum


def fold(out: Tensor, log_sum: Tensor, other: Tensor, other_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one softmax, put together."""
    total = torch.logaddexp(log_sum, other_sum)
    mine, others = torch.exp(log_sum - total)[..., None], torch.exp(other_sum - total)[..., None]
    return (out * mine + other * others).to(out.dtype), total
