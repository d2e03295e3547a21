"""Which experts one token is sent to, and by which shares: found by asking a router, and then two launches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.compilers import attempted
from sinkbench.engines.single import product
from sinkbench.engines.single.pending import Pending

MOST = 128  # experts: each is compared with each
ASKED = 256  # tokens for which a router is asked where it sends them

Routed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shares:
    """How a softmax of logits becomes shares of the ``count`` largest.

    Attributes:
        of_all: whether the shares of all experts add up to one, not those of the chosen.
        dtype: theirs.
    """

    count: int
    of_all: bool
    dtype: torch.dtype

    def plainly(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``(tokens, E)``, in plain torch: shares and experts, both ``(tokens, count)``."""
        top, experts = torch.topk(logits, self.count, dim=-1)
        if not self.of_all:
            return torch.softmax(top, dim=-1, dtype=torch.float32).to(self.dtype), experts
        return torch.softmax(logits, dim=-1, dtype=torch.float32).gather(-1, experts).to(self.dtype), experts


@triton.jit
def _share(
    logits, shares, experts, count, most,
    OF_ALL: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The ``most`` largest of ``count`` logits, the first of equals first, and their shares."""
    begin_next(OVERLAP)
    e = tl.arange(0, WIDTH)
    inside = e < count
    wait_for_last(OVERLAP)
    own = tl.load(logits + e, mask=inside, other=-float("inf")).to(tl.float32)
    # what is no number is larger than all, as for torch; what is none of them stands behind
    height = tl.where(own == own, own, float("inf"))  # noqa: PLR0124
    column, row = tl.reshape(height, (WIDTH, 1)), tl.reshape(height, (1, WIDTH))
    before = (row > column) | ((row == column) & (e[None, :] < e[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    chosen = inside & (rank < most)
    size = tl.exp(own - tl.max(own, axis=0))
    total = tl.sum(size if OF_ALL else tl.where(chosen, size, 0.0), axis=0)
    tl.store(shares + rank, (size / total).to(shares.dtype.element_ty), mask=chosen)
    tl.store(experts + rank, e.to(tl.int64), mask=chosen)


def shared(logits: Tensor, by: Shares) -> tuple[Tensor, Tensor]:
    """Shares and experts of one token, each ``(1, count)``, of its logits, ``(1, E)``, in one launch."""
    shares = logits.new_empty(1, by.count, dtype=by.dtype)
    experts = logits.new_empty(1, by.count, dtype=torch.long)
    told = {"OF_ALL": by.of_all, "WIDTH": triton.next_power_of_2(logits.numel()), "num_warps": 4}
    launch(_share, (1,), logits, shares, experts, logits.numel(), by.count, **told, **overlapping(logits))
    return shares, experts


def router_of(module: nn.Module, pending: Pending) -> Callable[[Tensor], Routed] | None:
    """A quicker forward for ``logits, shares, experts = module(x)``, by asking it; ``None`` for anything else."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    count = getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(bias, Tensor | None):
        return None
    if not isinstance(count, int) or not 0 < count <= len(weight) <= MOST or not weight.is_contiguous():
        return None
    more = {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - {"weight", "bias"}
    if weight.dtype not in product.DTYPES or any(module.children()) or more:
        return None  # more, such as a correction of what is chosen
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(ASKED, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=generator)
    try:
        logits, shares, experts = module(x)
        by = _shares(logits, shares, experts, count)
        close = torch.allclose(logits, F.linear(x, weight, bias), rtol=1e-2, atol=1e-2 * float(logits.abs().max()))
    except Exception:  # it is called in another way, or answers with something else
        return None
    if not close or by is None or attempted(shared, logits[:1].contiguous(), by) is None:
        return None
    return partial(_routed, module, by, module.forward, pending)


def _shares(logits: Tensor, shares: Tensor, experts: Tensor, count: int) -> Shares | None:
    """How these ``shares`` follow from these ``logits``; ``None`` where they do in another way."""
    if shares.dtype not in (logits.dtype, torch.float32):
        return None
    for by in (Shares(count, of_all, shares.dtype) for of_all in (False, True)):
        found, others = by.plainly(logits)
        near = found.shape == shares.shape and torch.allclose(found, shares, rtol=4 * torch.finfo(shares.dtype).eps)
        if near and torch.equal(logits.gather(-1, others), logits.gather(-1, experts)):  # equals in any order
            return by
    return None


def _routed(module: Any, by: Shares, plain: Callable[[Tensor], Routed], pending: Pending, x: Tensor) -> Routed:
    if x.numel() != module.weight.shape[1] or x.dtype != module.weight.dtype:
        return plain(x)
    pending.settle(x)
    logits = product.products(x.contiguous(), [module.weight], [getattr(module, "bias", None)])[0].view(1, -1)
    return logits, *shared(logits, by)
