"""The experts that one token is sent to, read where they lie.

transformers sorts tokens by expert and multiplies in groups, in some forty launches a layer, which pays for many
tokens. For one, each chosen matrix meets one vector (:mod:`sinkbench.engines.single.chosen`). A gate that is known goes
along with the first product; any other stands between the two as the module has it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkbench.attention.kernels.ahead import asking
from sinkbench.compilers import attempted
from sinkbench.engines.single import chosen
from sinkbench.engines.single.gates import Gate, gate_of
from sinkbench.engines.single.pending import Pending
from sinkbench.engines.single.product import DTYPES

LARGEST = 2**31  # numbers of a matrix


def experts_of_one(module: Any, gate: Gate | None, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """``(1, n)``: what ``module`` makes of one token, ``(1, n)``, sent to ``experts``, ``(1, K)``, by ``shares``."""
    first, second = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    experts, shares, turned = experts.reshape(-1).contiguous(), shares.reshape(-1).contiguous(), module.is_transposed
    inner = chosen.first(x.contiguous(), module.gate_up_proj, first, experts, turned, gate)
    inner = module._apply_gate(inner).contiguous() if gate is None else inner
    return chosen.second(inner, module.down_proj, second, experts, shares, turned)


def experts_of(module: nn.Module, pending: Pending) -> Callable[..., Tensor] | None:
    """A quicker forward for experts as transformers holds them, by asking them; ``None`` for anything else."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    said = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if not said or not module.has_gate or not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return None
    if gate_up.dim() != 3 or not (gate_up.is_contiguous() and down.is_contiguous()) or gate_up.dtype != down.dtype:
        return None
    if gate_up.dtype not in DTYPES:
        return None
    if max(gate_up[0].numel(), down[0].numel()) >= LARGEST:
        return None
    depth, width = gate_up.shape[1:] if module.is_transposed else gate_up.shape[:0:-1]
    x = torch.randn(1, depth, dtype=gate_up.dtype, device=gate_up.device)
    experts = torch.tensor([[0, len(gate_up) - 1]], device=x.device)
    shares = torch.tensor([[0.75, 0.25]], dtype=x.dtype, device=x.device)
    limits = (getattr(module, name, None) for name in ("alpha", "limit"))
    gate = gate_of(module._apply_gate, width, x.device, *limits)
    try:
        wanted = module(x, experts, shares)
    except Exception:  # they are called in another way
        return None
    got = attempted(_experts, module, gate, x, experts, shares)
    close = (
        got is not None
        and wanted.shape == got.shape
        and torch.allclose(wanted, got, rtol=1e-2, atol=1e-2 * float(got.abs().max()))
    )
    return partial(_sent, module, gate, module.forward, pending) if close else None


def _experts(module: Any, gate: Gate | None, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    with asking(x.device):
        experts_of_one(module, gate, x, experts, shares)
    return experts_of_one(module, gate, x, experts, shares)


def _sent(
    module: Any,
    gate: Gate | None,
    plain: Callable[..., Tensor],
    pending: Pending,
    x: Tensor,
    experts: Tensor,
    shares: Tensor,
) -> Tensor:
    if len(x) != 1 or len(experts) != 1 or x.dtype != module.gate_up_proj.dtype:
        return plain(x, experts, shares)
    pending.settle(x, experts, shares)
    return experts_of_one(module, gate, x, experts, shares)
