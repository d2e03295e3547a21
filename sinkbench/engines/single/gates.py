"""The gate between the two products of an expert: found by asking it, and for Triton programs of ours."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.engines.single.activation import ACTIVATIONS, activated


@dataclass(frozen=True)
class Gate:
    """``activation(gate) * up``; or, ``clamped``, ``(up + 1) * gate * sigmoid(alpha * gate)`` within a limit.

    Attributes:
        kind: one of :data:`ACTIVATIONS`, or ``clamped``, as gpt-oss has it: ``gate`` is at most ``limit``, and so is
            the size of ``up``.
        interleaved: whether what opens and what passes take turns; otherwise all that passes stands behind.
    """

    kind: str
    interleaved: bool
    alpha: float = 0.0
    limit: float = 0.0

    def plainly(self, both: Tensor) -> Tensor:
        """Of ``(..., 2 n)``, in plain torch, ``(..., n)``."""
        gate, up = (both[..., ::2], both[..., 1::2]) if self.interleaved else both.chunk(2, dim=-1)
        if self.kind != "clamped":
            return ACTIVATIONS[self.kind](gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def gate_of(
    apply: Callable[[Tensor], Tensor], width: int, device: torch.device, alpha: object, limit: object
) -> Gate | None:
    """The gate that ``apply`` is of ``(..., width)``; ``None`` where it is none of those known here.

    Args:
        alpha: what the module has by this name, and so ``limit``; anything but a number means that it has none.
    """
    found = [Gate(kind, interleaved) for kind in ACTIVATIONS for interleaved in (False, True)]
    if isinstance(alpha, float | int) and isinstance(limit, float | int):
        found += [Gate("clamped", interleaved, float(alpha), float(limit)) for interleaved in (False, True)]
    generator = torch.Generator(device).manual_seed(0)
    both = torch.randn(3, width, dtype=torch.float64, device=device, generator=generator)
    both *= torch.tensor([[3.0], [30.0], [1e4]], device=device)  # beyond whatever limits there are
    try:
        wanted = apply(both)
        return next((gate for gate in found if torch.allclose(gate.plainly(both), wanted, rtol=1e-6, atol=1e-6)), None)
    except Exception:  # it is called in another way
        return None


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def let_through(gate, up, KIND: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """What a gate makes of float32 numbers that are rounded to ``DTYPE``, rounded in between as torch would."""
    if KIND == "clamped":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        opened = _rounded(1.0 / (1.0 + tl.exp(-_rounded(gate * ALPHA, DTYPE))), DTYPE)
        return _rounded(up + 1.0, DTYPE) * _rounded(gate * opened, DTYPE)
    return _rounded(activated(gate, KIND), DTYPE) * up
