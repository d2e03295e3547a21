"""Random numbers that depend on what they are for and not on who asks, or when: a counter-based generator.

A mix of SplitMix64's finaliser (Steele, Lea and Flood, 2014) over the counters, in wrapping 64-bit integers, so that
every engine, device and dtype draws the same.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from sinkbench.compilers import by_program

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEP, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # SplitMix64's, as signed numbers


def draw(seed: int, layers: "Tensor | int", tokens: "Tensor") -> "Tensor":
    """A number in [0, 1) for each entry, float64, ``(B, H, n)``, by seed, layer, head and index in the text.

    Args:
        layers: the layer of all streams, or of each, int64, ``(B, 1, 1)``.
        tokens: indices in the text, int64, ``(B, H, n)``.
    """
    if not isinstance(layers, int):
        heads = _heads(seed, layers, tokens.shape[1])
    else:
        heads = _heads_of(seed, layers, tokens.shape[1], tokens.device)
        drawn: Tensor | None = by_program(tokens, "sinkbench.strategies.kernels.draws.draw", heads, tokens)
        if drawn is not None:
            return drawn
    return _shifted(_mix(heads + tokens), 11).double() / 2**53


@lru_cache(maxsize=1024)  # every chunk asks it of every layer: a score of launches for a few numbers
def _heads_of(seed: int, layer: int, heads: int, device: "torch.device") -> "Tensor":
    """As :func:`_heads`, of one layer, ``(H, 1)``."""
    import torch

    return _heads(seed, torch.tensor(layer), heads).to(device)


def _heads(seed: int, layers: "Tensor", heads: int) -> "Tensor":
    """What is mixed of all but the token, ``(..., H, 1)``."""
    import torch

    each = torch.arange(heads, device=layers.device)[:, None]
    return _mix(_mix(layers + _signed(_mix_number(seed))) + each)


def _mix_number(x: int) -> int:
    """As :func:`_mix`, of one number, without a tensor that a device would have to wait for."""
    x = (x + STEP) % 2**64
    x = ((x ^ (x >> 30)) * FIRST) % 2**64
    x = ((x ^ (x >> 27)) * SECOND) % 2**64
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _mix(x: "Tensor") -> "Tensor":
    x = x + STEP
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: "Tensor", by: int) -> "Tensor":
    """``x`` shifted to the right as an unsigned number."""
    return (x >> by) & ((1 << (64 - by)) - 1)
