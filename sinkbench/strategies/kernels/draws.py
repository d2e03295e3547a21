"""What :mod:`sinkbench.strategies.draws` draws of each token, in one launch, as a Triton program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.strategies.draws import FIRST, SECOND, STEP

BLOCK = 1024  # draws of a program


@triton.jit(do_not_specialize=["count", "columns"])
def _draw(
    heads, tokens, out, count, columns, number,
    STEP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    x = tl.load(tokens + i, mask=there, other=0) + tl.load(heads + i // columns % number, mask=there, other=0)
    x = (x + STEP).to(tl.uint64, bitcast=True)
    x = ((x ^ (x >> 30)).to(tl.int64, bitcast=True) * FIRST).to(tl.uint64, bitcast=True)
    x = ((x ^ (x >> 27)).to(tl.int64, bitcast=True) * SECOND).to(tl.uint64, bitcast=True)
    x = (x ^ (x >> 31)) >> 11
    tl.store(out + i, x.to(tl.float64) * (1.0 / 9007199254740992.0), mask=there)


def draw(heads: Tensor, tokens: Tensor) -> Tensor:
    """As :func:`sinkbench.strategies.draws.draw`, given what all but the token is mixed to, ``(H, 1)``."""
    tokens = tokens.contiguous()
    out = torch.empty(tokens.shape, dtype=torch.float64, device=tokens.device)
    _draw[(triton.cdiv(out.numel(), BLOCK),)](
        *(heads, tokens, out, out.numel(), tokens.shape[2], tokens.shape[1]),
        **{"STEP": STEP, "FIRST": FIRST, "SECOND": SECOND, "BLOCK": BLOCK, "num_warps": 4},
    )
    return out
