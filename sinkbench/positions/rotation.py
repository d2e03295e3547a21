"""Rotations of queries, in a form that a kernel can apply whatever the pairing of features."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sinkbench.positions.rotary import Rope, wide


@dataclass
class Rotation:
    """Rotations of queries: ``q * cos + q[partner] * sin``.

    Attributes:
        cos: ``(n, D)``, 1 where a feature does not rotate.
        sin: ``(n, D)``, with the sign of the partner's share.
        partner: ``(D,)``, int32, the feature that each rotates with.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    @classmethod
    def still(cls, rope: Rope | None, dim: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """One query's rotation that leaves everything where it is, until :meth:`set`."""
        partner = torch.arange(dim, dtype=torch.int32, device=device)
        if rope is not None:
            pairs = rope.inv_freq.shape[0]
            quarter = torch.zeros(1, pairs, device=device), torch.ones(1, pairs, device=device)
            turned = rope.apply(torch.arange(1.0, dim + 1, device=device)[None], *quarter)  # swaps partners
            partner[: 2 * pairs] = (turned[0, : 2 * pairs].abs() - 1).int()
        ones, zeros = (torch.full((1, dim), value, dtype=wide(dtype), device=device) for value in (1.0, 0.0))
        return cls(ones, zeros, partner)

    def by(self, rope: Rope, by: Tensor) -> "Rotation":
        """The rotations by ``by`` positions, shape ``(n,)``."""
        cos, sin = rope.turn(by)
        wider = cos.new_ones(len(by), 2 * cos.shape[1])
        rest = cos.new_zeros(len(by), self.partner.shape[0] - wider.shape[1])
        full_cos = torch.cat((rope.apply(wider, cos, torch.zeros_like(sin)), rest + 1), dim=1)
        full_sin = torch.cat((rope.apply(wider, torch.zeros_like(cos), sin), rest), dim=1)
        return Rotation(full_cos.to(self.cos.dtype), full_sin.to(self.cos.dtype), self.partner)

    def set(self, rope: Rope, by: Tensor) -> None:
        """Let this be the rotation by ``by`` positions, shape ``(n,)``."""
        new = self.by(rope, by)
        self.cos.copy_(new.cos)
        self.sin.copy_(new.sin)

    def rows(self, rows: slice) -> "Rotation":
        """The rotations of some of the queries."""
        return Rotation(self.cos[rows], self.sin[rows], self.partner)

    def __call__(self, query: Tensor) -> Tensor:
        """``query`` of shape ``(..., n, D)``, rotated; in its own dtype."""
        x = query.to(wide(query.dtype))
        return (x * self.cos + x[..., self.partner.long()] * self.sin).to(query.dtype)
