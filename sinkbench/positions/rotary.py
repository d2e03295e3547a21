"""Rotary positions: how a key is moved from one position to another.

Rotary embeddings (RoFormer, arXiv 2104.09864) turn pairs of a key's features by ``position * frequency``.
Moving a key by ``d`` positions is one more turn by ``d * frequency``, so a key that a model has already
rotated can be moved without knowing what it was before. Scalings that change the frequencies (linear, llama3,
yarn, longrope) or multiply the result (yarn's and longrope's attention factor) stay valid under such a move.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of ``dtype`` are computed with: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Rope:
    """The rotation of one layer's keys.

    Attributes:
        inv_freq: radians a position, float64, shape ``(pairs,)``. The first ``2 * pairs`` features rotate.
        pairing: ``half`` turns features ``i`` and ``i + pairs`` together (Llama), ``interleaved`` ``2i``, ``2i + 1``.
        limit: the longest sequence for which ``inv_freq`` is the truth, where the model changes its
            frequencies with the sequence length (dynamic NTK, longrope); ``None`` where it never does.
        rescale: the frequencies for a sequence of a given length, where there is a ``limit``.
    """

    inv_freq: Tensor
    pairing: Pairing = "half"
    limit: int | None = None
    rescale: Callable[[int], Tensor] | None = field(default=None, compare=False)

    def __deepcopy__(self, memo: object) -> "Rope":
        """Itself, as it never changes."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what asks the model; a cache that was pickled reads its model's positions again."""
        return Rope, (self.inv_freq, self.pairing, self.limit)

    def at_length(self, length: int) -> "Rope":
        """The rotation a model uses when the longest position it sees is ``length - 1``."""
        if self.limit is None or self.rescale is None or length <= self.limit:
            return self
        return Rope(self.rescale(length).double(), self.pairing, self.limit, self.rescale)

    def turn(self, by: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a move by ``by`` positions, shape ``(..., pairs)`` for ``(...)``, float64.

        Angles are formed in float64: at position 10^6 a float32 angle is off by 0.06 rad.
        """
        angles = by.double()[..., None] * self.inv_freq.to(by.device)
        return angles.cos(), angles.sin()

    def move(self, x: Tensor, by: Tensor) -> Tensor:
        """Move ``x`` of shape ``(..., T, D)`` by ``by`` positions, shape ``(..., T)`` or one that broadcasts to it."""
        return self.apply(x, *self.turn(by))

    def apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn ``x`` of shape ``(..., T, D)`` by the angles of :meth:`turn`, computing in float32 or wider."""
        pairs, dtype = cos.shape[-1], wide(x.dtype)
        cos, sin, rotating = cos.to(dtype), sin.to(dtype), x[..., : 2 * pairs].to(dtype)
        if self.pairing == "half":
            a, b = rotating[..., :pairs], rotating[..., pairs:]
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = rotating[..., 0::2], rotating[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        turned = turned.to(x.dtype)
        return turned if 2 * pairs == x.shape[-1] else torch.cat((turned, x[..., 2 * pairs :]), dim=-1)
