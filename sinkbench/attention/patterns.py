"""Scans of strategies whose scores follow a pattern: what they read is formed for the whole chunk, then one kernel runs.

:mod:`sinkbench.attention.kernels.host` and :mod:`sinkbench.attention.kernels.scans` have the kernels, under the same
names and with the same arguments.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sinkbench.attention.rows import Rows
from sinkbench.strategies import Held


def kernels_for(device: torch.device) -> ModuleType | None:
    """The module with the scans for ``device``; ``None`` where what compiles them is not installed."""
    try:
        if device.type == "cuda":
            from sinkbench.attention.kernels import scans as kernels
        elif device.type == "cpu":
            from sinkbench.attention.kernels import host as kernels
        else:
            return None
    except ImportError:
        return None
    return kernels


def by_pattern(rows: Rows) -> Tensor | None:
    """As :func:`sinkbench.attention.scan.scan`; ``None`` where the strategy has no pattern, or there are no kernels."""
    pattern = rows.eviction.pattern
    kernels = kernels_for(rows.tokens.device) if pattern else None
    if kernels is None or not rows.n:
        return None
    make = {"fixed": _fixed, "summed": _summed, "averaged": _summed, "newest": _newest, "alike": _alike}[pattern]
    died = torch.full_like(rows.tokens, rows.n)
    make(kernels, rows, died)
    return died


def _limits(rows: Rows) -> dict[str, Any]:
    policy = rows.policy
    return {
        "held": rows.held,
        "first": rows.first,
        "window": rows.window,
        "sinks": policy.sinks,
        "recent": policy.protected,
    }


def _fixed(kernels: Any, rows: Rows, died: Tensor) -> None:
    scores = rows.eviction.score(
        Held(rows.tokens, rows.first + rows.n - 1, rows.memory, rows.layer, _no_weights, lambda: rows.keys)
    ).expand(rows.tokens.shape)
    kernels.fixed(*_flat(scores, rows.tokens, died), n=rows.n, tolerance=rows.eviction.tolerance, **_limits(rows))


def _no_weights() -> Tensor:
    raise TypeError("a score of the pattern 'fixed' does not look at weights")


def _summed(kernels: Any, rows: Rows, died: Tensor) -> None:
    powers, extra = _powers(rows)
    scores, totals = rows.scores.flatten(0, 1), rows.memory[rows.eviction.memory[0]]
    averaged = rows.eviction.pattern == "averaged"
    arrays = (powers.flatten(0, 1), scores, extra.flatten(0, 1), *_flat(totals, rows.tokens, died))
    kernels.summed(*arrays, averaged=averaged, **_limits(rows))


def _newest(kernels: Any, rows: Rows, died: Tensor) -> None:
    powers, extra = _powers(rows)
    of_layer = died[:, 0].contiguous()
    kernels.newest(
        *(powers.flatten(1, 2), rows.scores.flatten(1, 2), extra.flatten(1, 2)),
        *(rows.tokens[:, 0].contiguous(), of_layer),
        **_limits(rows),
    )
    died.copy_(of_layer[:, None].expand_as(died))


def _alike(kernels: Any, rows: Rows, died: Tensor) -> None:
    keys = rows.keys.to(torch.promote_types(rows.keys.dtype, torch.float32))
    unit = keys / keys.norm(dim=-1, keepdim=True)
    products = torch.matmul(unit, unit.transpose(-1, -2)).flatten(0, 1)
    kernels.alike(products, *_flat(_marks(rows.keys), rows.tokens, died), n=rows.n, **_limits(rows))


def _flat(*arrays: Tensor) -> tuple[Tensor, ...]:
    """``(B, H, ...)`` as ``(B * H, ...)``, contiguous; what was contiguous shares its memory."""
    return tuple(x.contiguous().flatten(0, 1) for x in arrays)


def _powers(rows: Rows) -> tuple[Tensor, Tensor]:
    """The exponentials of scores less the largest that a query could see, and of the logit that joins its softmax."""
    n, m = rows.scores.shape[3:]
    device = rows.scores.device
    later = torch.arange(-rows.held, n, device=device)[None] > torch.arange(n, device=device)[:, None]
    largest = rows.scores.masked_fill_(later, -torch.inf).amax(-1, keepdim=True)
    extra = torch.zeros_like(largest[..., 0])
    if rows.extra is not None:
        largest = torch.maximum(largest, rows.extra[..., None, None])
        extra = torch.exp(rows.extra[..., None] - largest[..., 0])
    return torch.exp(rows.scores - largest), extra


def _marks(keys: Tensor) -> Tensor:
    """A number for each key, ``(B, H, m)``, int64: equal where all bits are equal, and by no likely chance otherwise."""
    bits = keys.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[keys.element_size()]).long()
    factors = torch.arange(1, bits.shape[-1] + 1, device=keys.device) * 0x9E3779B97F4A7C1 + 0x7F4A7C15
    return ((bits ^ (bits >> 29)) * (factors | 1)).sum(-1)
