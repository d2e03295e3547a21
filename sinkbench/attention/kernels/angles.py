"""By which angles a token's heads turn, and how a model lays them out."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sinkbench.positions.rotary import Rope


class Layout(NamedTuple):
    """How a rotary function pairs features and reads its angles.

    Attributes:
        interleaved: whether features ``2i`` and ``2i + 1`` are a pair, and not ``i`` and one half the features on.
        by_pair: whether pair ``i`` reads angle ``i``, and not each feature its own.
        short: whether there are as many angles as pairs, and not as many as features.
    """

    interleaved: bool
    by_pair: bool
    short: bool

    def angles(self, count: int, device: torch.device) -> Tensor:
        """``count`` random angles, laid out so."""
        if self.short:
            return torch.rand(count, device=device)
        each = torch.rand(count // 2, device=device)
        return each.repeat_interleave(2) if self.interleaved and not self.by_pair else torch.cat((each, each))


@dataclass(frozen=True)
class Angles:
    """Cosines and sines of one position, and how they lie; the features behind :attr:`rotating` stay as they are."""

    cos: Tensor
    sin: Tensor
    layout: Layout

    @property
    def rotating(self) -> int:
        """Features that turn."""
        return self.cos.numel() * (2 if self.layout.short else 1)

    def of(self, rope: Rope | None) -> bool:
        """Whether ``rope`` turns the same pairs of features."""
        pairing = "interleaved" if self.layout.interleaved else "half"
        return rope is not None and rope.pairing == pairing and 2 * len(rope.inv_freq) == self.rotating

    def same(self, other: "Angles") -> bool:
        """Whether both are the same numbers in memory."""
        alike = self.layout == other.layout and self.cos.shape == other.cos.shape
        return alike and all(x.data_ptr() == y.data_ptr() for x, y in ((self.cos, other.cos), (self.sin, other.sin)))
