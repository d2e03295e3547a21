"""Turns of queries, in a form that a kernel can apply whatever the pairing of features."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sinkbench.positions.rotary import Rope


@dataclass
class Rotation:
    """Turns of queries: ``q * cos + q[partner] * sin``.

    Attributes:
        cos: ``(n, D)``, 1 where a feature does not rotate.
        sin: ``(n, D)``, with the sign of the partner's share.
        partner: ``(D,)``, int32, the feature that each rotates with.
    """

    cos: Tensor
    sin: Tensor
    partner: Tensor

    @classmethod
    def still(cls, rope: Rope | None, dim: int, device: torch.device) -> Self:
        """One query's turn that leaves everything where it is, until :meth:`set`."""
        partner = torch.arange(dim, dtype=torch.int32, device=device)
        if rope is not None:
            pairs = rope.inv_freq.shape[0]
            quarter = torch.zeros(1, pairs, device=device), torch.ones(1, pairs, device=device)
            turned = rope.apply(torch.arange(1.0, dim + 1, device=device)[None], *quarter)  # swaps partners
            partner[: 2 * pairs] = (turned[0, : 2 * pairs].abs() - 1).int()
        return cls(torch.ones(1, dim, device=device), torch.zeros(1, dim, device=device), partner)

    def by(self, rope: Rope, by: Tensor) -> "Rotation":
        """The turns by ``by`` positions, shape ``(n,)``."""
        cos, sin = rope.turn(by)
        wide = cos.new_ones(len(by), 2 * cos.shape[1])
        rest = cos.new_zeros(len(by), self.partner.shape[0] - wide.shape[1])
        full_cos = torch.cat((rope.apply(wide, cos, torch.zeros_like(sin)), rest + 1), dim=1)
        full_sin = torch.cat((rope.apply(wide, torch.zeros_like(cos), sin), rest), dim=1)
        return Rotation(full_cos, full_sin, self.partner)

    def set(self, rope: Rope, by: Tensor) -> None:
        """Let this be the turn by ``by`` positions, shape ``(1,)``."""
        new = self.by(rope, by)
        self.cos.copy_(new.cos)
        self.sin.copy_(new.sin)

    def rows(self, rows: slice) -> "Rotation":
        """The turns of some of the queries."""
        return Rotation(self.cos[rows], self.sin[rows], self.partner)

    def __call__(self, query: Tensor) -> Tensor:
        """``query`` of shape ``(..., n, D)``, turned; in its own dtype."""
        turned = query.float() * self.cos + query.float()[..., self.partner.long()] * self.sin
        return turned.to(query.dtype)
