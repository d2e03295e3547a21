"""The experts that one token is sent to, read where they lie, as a Triton program.

transformers sorts tokens by expert and multiplies in groups, in some forty launches a layer, which pays for many
tokens. For one, each chosen matrix meets one vector: a launch reads those of all chosen experts, by numbers that lie on
the device, and whatever stands between their two products is the module's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from sinkbench.engines.single.pending import Pending

# Numbers of a matrix that a program asks for at once: columns, and how many of each. What lies side by side is read
# side by side, 128 bytes of bfloat16 at least, and a thread holds 64 to 128 of them.
ACROSS, DOWN = (64, 256), (8, 1024)


@triton.jit
def _multiply(
    x, out, weight, bias, experts, depth, width, x_row,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Some columns of the product of one of the vectors with the matrix of its expert."""
    k = tl.program_id(1)
    expert = tl.load(experts + k).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < width
    weight += expert * depth * width
    x += k * x_row
    sums = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(0, depth, ROWS):
        rows = begin + tl.arange(0, ROWS)
        there = rows < depth
        vector = tl.load(x + rows, mask=there, other=0.0).to(tl.float32)
        if TRANSPOSED:
            place = weight + rows[:, None].to(tl.int64) * width + columns[None, :]
            own = tl.load(place, mask=there[:, None] & here[None, :], other=0.0, eviction_policy="evict_first")
            sums += tl.sum(own.to(tl.float32) * vector[:, None], axis=0)
        else:
            place = weight + columns[:, None].to(tl.int64) * depth + rows[None, :]
            own = tl.load(place, mask=here[:, None] & there[None, :], other=0.0, eviction_policy="evict_first")
            sums += tl.sum(own.to(tl.float32) * vector[None, :], axis=1)
    if BIAS:
        sums += tl.load(bias + expert * width + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(out + k * width + columns, sums.to(out.dtype.element_ty), mask=here)


def chosen(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, transposed: bool) -> Tensor:
    """``(K, n)``: of each of ``experts``, ``(K,)``, its matrix times its vector, plus its bias, summed in float32.

    Args:
        x: ``(1, depth)``, one vector for all, or ``(K, depth)``.
        weight: ``(E, n, depth)``, or, ``transposed``, ``(E, depth, n)``.
        bias: ``(E, n)``.
    """
    depth, width = weight.shape[1:] if transposed else weight.shape[:0:-1]
    count, (columns, rows) = len(experts), ACROSS if transposed else DOWN
    out = x.new_empty(count, width)
    _multiply[(triton.cdiv(width, columns), count)](
        *(x, out, weight, bias if bias is not None else weight, experts, depth, width, 0 if len(x) == 1 else depth),
        **{"COLUMNS": columns, "ROWS": rows, "TRANSPOSED": transposed, "BIAS": bias is not None, "num_warps": 4},
    )
    return out


def _of_one(module: Any, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """``(1, n)``: what ``module`` makes of one token, ``(1, n)``, sent to ``experts``, ``(1, K)``, by ``shares``."""
    with_bias = module.has_bias
    first = module.gate_up_proj_bias if with_bias else None
    second = module.down_proj_bias if with_bias else None
    experts, turned = experts.reshape(-1), module.is_transposed
    inner = chosen(x.contiguous(), module.gate_up_proj, first, experts, turned)
    found = chosen(module._apply_gate(inner).contiguous(), module.down_proj, second, experts, turned)
    return (found * shares.reshape(-1, 1)).sum(0, keepdim=True).to(x.dtype)


def experts_of(module: nn.Module, pending: Pending) -> Callable[..., Tensor] | None:
    """A quicker forward for experts as transformers holds them, by asking them; ``None`` for anything else."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    said = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if not said or not module.has_gate or not isinstance(gate_up, Tensor) or not isinstance(down, Tensor):
        return None
    if gate_up.dim() != 3 or not (gate_up.is_contiguous() and down.is_contiguous()) or gate_up.dtype != down.dtype:
        return None
    if gate_up.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    x = torch.randn(1, gate_up.shape[1 if module.is_transposed else 2], dtype=gate_up.dtype, device=gate_up.device)
    experts = torch.tensor([[0, len(gate_up) - 1]], device=x.device)
    shares = torch.tensor([[0.75, 0.25]], dtype=x.dtype, device=x.device)
    try:
        wanted = module(x, experts, shares)
    except Exception:  # they are called in another way
        return None
    got = _of_one(module, x, experts, shares)
    close = wanted.shape == got.shape and torch.allclose(wanted, got, rtol=1e-2, atol=1e-2 * float(got.abs().max()))
    return partial(_sent, module, module.forward, pending) if close else None


def _sent(
    module: Any, plain: Callable[..., Tensor], pending: Pending, x: Tensor, experts: Tensor, shares: Tensor
) -> Tensor:
    if len(x) != 1 or len(experts) != 1 or x.dtype != module.gate_up_proj.dtype:
        return plain(x, experts, shares)
    pending.settle(x, experts, shares)
    return _of_one(module, x, experts, shares)
