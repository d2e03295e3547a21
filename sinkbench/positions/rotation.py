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
        return self._of(rope, *rope.turn(by))

    def _of(self, rope: Rope, cos: Tensor, sin: Tensor) -> "Rotation":
        """The rotations of these angles, ``(n, pairs)``, float64."""
        wider = cos.new_ones(cos.shape[0], 2 * cos.shape[1])
        rest = cos.new_zeros(cos.shape[0], self.partner.shape[0] - wider.shape[1])
        full_cos = torch.cat((rope.apply(wider, cos, torch.zeros_like(sin)), rest + 1), dim=1)
        full_sin = torch.cat((rope.apply(wider, torch.zeros_like(cos), sin), rest), dim=1)
        return Rotation(full_cos.to(self.cos.dtype), full_sin.to(self.cos.dtype), self.partner)

    def by_one(self, rope: Rope, by: int) -> "Rotation":
        """The rotation by ``by`` positions, for all; nothing is sent to the device for it."""
        angles = (rope.inv_freq.to(self.cos.device) * by)[None]
        return self._of(rope, angles.cos(), angles.sin())

    def rows(self, rows: slice) -> "Rotation":
        """The rotations of some of the queries."""
        return Rotation(self.cos[rows], self.sin[rows], self.partner)

    def __call__(self, query: Tensor) -> Tensor:
        """``query`` of shape ``(..., n, D)``, rotated; in its own dtype."""
        x = query.to(wide(query.dtype))
        return (x * self.cos + x[..., self.partner] * self.sin).to(query.dtype)


@dataclass
class Move:
    """The last move of keys with one rope."""

    rope: Rope
    still: Rotation
    by: int
    rotation: Rotation


ROPES = 8  # that are remembered: more than there are kinds of layers


class Moves:
    """Moves of keys, whose rotations all layers that move alike share.

    Of each rope, on each device, the last by one distance is remembered, as every layer of a step asks for the same;
    and a table of moves forward, for keys that each go their own way.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, torch.device], Move] = {}
        self._tables: dict[tuple[int, torch.device], tuple[Rope, Rotation]] = {}

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Copied and pickled without what is remembered: it is of ropes that a copy does not have."""
        return type(self), ()

    def move(self, rope: Rope, x: Tensor, by: int) -> Tensor:
        """``x``, of shape ``(..., T, D)``, moved by ``by`` positions."""
        key = id(rope), x.device
        last = self._last.get(key)
        if last is None or last.rope is not rope:
            if len(self._last) >= ROPES:  # where frequencies follow the length, each step has a rope of its own
                self._last.clear()
            still = Rotation.still(rope, x.shape[-1], x.device, x.dtype)
            last = self._last[key] = Move(rope, still, 0, still)
        if last.by != by:
            last.by, last.rotation = by, last.still.by_one(rope, by)
        return last.rotation(x)

    def move_each(self, rope: Rope, x: Tensor, by: Tensor, most: int) -> Tensor:
        """``x``, of shape ``(..., T, D)``, moved by ``by``, int64 ``(..., T)``, each from 0 to ``most``."""
        key = id(rope), x.device
        known, table = self._tables.get(key, (None, None))
        if known is not rope or table is None or len(table.cos) <= most:
            if rope.limit is not None and most >= rope.limit:  # this length's frequencies, which no other step has
                return rope.move(x, by)
            still = Rotation.still(rope, x.shape[-1], x.device, x.dtype)
            table = still.by(rope, torch.arange(2 * most + 1, device=x.device))
            self._tables[key] = rope, table
        return Rotation(table.cos[by], table.sin[by], table.partner)(x)
