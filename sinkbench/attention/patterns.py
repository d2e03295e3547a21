"""Scans of strategies whose scores follow a pattern: what they read is formed for the whole chunk; one kernel runs.

:mod:`sinkbench.attention.kernels.host` and :mod:`sinkbench.attention.kernels.device` have the kernels, under the same
names and with the same arguments.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sinkbench.attention.kernels import kernels
from sinkbench.attention.rows import Rows
from sinkbench.compilers import attempted
from sinkbench.strategies import Held


@cache
def scans_for(kind: str) -> ModuleType | None:
    """The scans for a kind of device; ``None`` where what compiles them is not installed."""
    name = {"cpu": "host", "cuda": "device"}.get(kind)
    return None if name is None else kernels(name)


def by_pattern(rows: Rows) -> Tensor | None:
    """As :func:`sinkbench.attention.scan.scan`; ``None`` where the strategy has no pattern, or there are no kernels."""
    pattern = rows.eviction.pattern
    scans = scans_for(rows.tokens.device.type) if pattern else None
    if scans is None or not rows.n:
        return None
    scan = {"fixed": _fixed, "summed": _summed, "averaged": _summed, "newest": _newest, "alike": _alike}[pattern]
    return attempted(scan, scans, rows, torch.full_like(rows.tokens, rows.n))


def _limits(rows: Rows) -> dict[str, Any]:
    policy = rows.policy
    return {
        "held": rows.held,
        "first": rows.first,
        "window": rows.window,
        "sinks": policy.sinks,
        "recent": policy.protected,
    }


def _fixed(scans: Any, rows: Rows, died: Tensor) -> Tensor:
    scores = rows.eviction.score(
        Held(rows.tokens, rows.first + rows.n - 1, rows.memory, rows.layer, _no_weights, lambda: rows.keys)
    ).expand(rows.tokens.shape)
    scans.fixed(*_flat(scores, rows.tokens, died), n=rows.n, tolerance=rows.eviction.tolerance, **_limits(rows))
    return died


def _no_weights() -> Tensor:
    raise TypeError("a score of the pattern 'fixed' does not look at weights")


def _summed(scans: Any, rows: Rows, died: Tensor) -> Tensor:
    totals = rows.memory[rows.eviction.memory[0]]
    averaged = rows.eviction.pattern == "averaged"
    extra = None if rows.extra is None else rows.extra.repeat(len(rows.tokens), 1)
    arrays = (rows.scores.flatten(0, 1), extra, *_flat(totals, rows.tokens, died))
    scans.summed(*arrays, averaged=averaged, **_limits(rows))
    return died


def _newest(scans: Any, rows: Rows, died: Tensor) -> Tensor:
    of_layer = died[:, 0].contiguous()
    extra = None if rows.extra is None else rows.extra.flatten().repeat(len(rows.tokens), 1)
    arrays = rows.scores.flatten(1, 2), extra, rows.tokens[:, 0].contiguous(), of_layer
    scans.newest(*arrays, beside=rows.beside, **_limits(rows))
    return died.copy_(of_layer[:, None].expand_as(died))


def _alike(scans: Any, rows: Rows, died: Tensor) -> Tensor:
    scans.alike(*_flat(rows.keys, rows.tokens, died), n=rows.n, **_limits(rows))
    return died


def _flat(*arrays: Tensor) -> tuple[Tensor, ...]:
    """``(B, H, ...)`` as ``(B * H, ...)``, contiguous; what was contiguous shares its memory."""
    return tuple(x.contiguous().flatten(0, 1) for x in arrays)
