"""The rotations by which the queries of a captured step meet the sinks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sinkbench.cache.strip import StripLayer
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Policy


class Turns:
    """Of all layers with one rope: a row for each way of counting where a query stands when it meets the sinks.

    Attributes:
        ways: the policy that counts, or ``None`` where the text does.
        rotation: a row for each of :attr:`ways`; rings hold views of its rows.
    """

    def __init__(self, rope: Rope, layers: Sequence[StripLayer], device: torch.device, dtype: torch.dtype) -> None:
        alike = [layer for layer in layers if layer.rope is rope and turns(layer)]
        dim = alike[0].plan.sizes.head_dim
        self.rope, self.ways = rope, list(dict.fromkeys(_way(layer) for layer in alike))
        rows = [Rotation.still(rope, dim, device, dtype) for _ in self.ways]
        cos, sin = (torch.cat([getattr(row, name) for row in rows]) for name in ("cos", "sin"))
        self.rotation = Rotation(cos, sin, rows[0].partner)
        # radians a position of each feature, and the sign of its partner's share: no launch a step for the pairing
        frequencies = rope.inv_freq.to(device)
        ones, zeros = frequencies.new_ones(1, 2 * len(frequencies)), torch.zeros_like(frequencies)[None]
        self.frequencies, self.signs = (frequencies.new_zeros(1, dim) for _ in range(2))
        self.frequencies[:, : ones.shape[1]] = rope.apply(ones, frequencies[None], zeros)
        self.signs[:, : ones.shape[1]] = rope.apply(ones, zeros, zeros + 1)

    def of(self, layer: StripLayer) -> Rotation:
        """The row of ``layer``."""
        row = self.ways.index(_way(layer))
        return self.rotation.rows(slice(row, row + 1))

    def set(self, token: Tensor, position: Tensor) -> None:
        """Let these be the rotations of the query of ``token``, which stands at ``position``; both ``(1,)``."""
        met = [token if way is None else way.held(token) for way in self.ways]
        angles = (torch.cat(met) - position).double()[:, None] * self.frequencies
        self.rotation.cos.copy_(angles.cos())
        self.rotation.sin.copy_(angles.sin() * self.signs)


def turns(layer: StripLayer) -> bool:
    """Whether a query of this layer has to turn before it meets the sinks."""
    return layer.rope is not None and layer.policy.sinks > 0 and layer.policy.window is not None


def _way(layer: StripLayer) -> Policy | None:
    return None if layer.plan.gap else layer.policy


def turns_of(layers: Sequence[StripLayer], device: torch.device, dtype: torch.dtype) -> list[Turns]:
    """One for each rope by which queries of these layers turn."""
    ropes = {id(layer.rope): layer.rope for layer in layers if turns(layer)}
    return [Turns(rope, layers, device, dtype) for rope in ropes.values() if rope is not None]
