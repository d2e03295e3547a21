"""-ln p of one token a row, in two launches and without a copy of the logits, on CUDA.

A row is read in parts, as a step has one row alone and many processors that wait. Each part leaves the largest of its
logits, and the sum of the others' powers beside it, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.softmax import joined, safe

BLOCK, PARTS, ROWS = 1024, 64, 256  # columns at a time; parts of a row at most; rows that are enough by themselves


@triton.jit
def _part_sums(logits, tops, sums, columns, apart, width, BLOCK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    begin = part * width
    end = tl.minimum(begin + width, columns)
    top = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(begin, end, BLOCK):
        column = at + tl.arange(0, BLOCK)
        x = tl.load(logits + row.to(tl.int64) * apart + column, mask=column < end, other=-float("inf")).to(tl.float32)
        new = tl.maximum(top, x)
        beside = safe(new)
        total = total * tl.exp(top - beside) + tl.exp(x - beside)
        top = new
    whole, share = joined(top, total)
    place = row * tl.num_programs(1) + part
    tl.store(tops + place, whole)
    tl.store(sums + place, share)


@triton.jit
def _nll(logits, labels, tops, sums, out, apart, parts, PARTS: tl.constexpr):
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    top = tl.load(tops + row * parts + part, mask=part < parts, other=-float("inf"))
    total = tl.load(sums + row * parts + part, mask=part < parts, other=0.0)
    whole, share = joined(top, total)
    wanted = tl.load(logits + row.to(tl.int64) * apart + tl.load(labels + row)).to(tl.float32)
    tl.store(out + row, tl.log(share) + whole - wanted)


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of ``labels``, int64 ``(n,)``, under ``logits``, ``(n, vocabulary)``, of float32 or half precision.

    Answers in float32, ``(n,)``.
    """
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    n, columns = logits.shape
    parts = 1 if n >= ROWS else max(1, min(PARTS, triton.cdiv(columns, 4 * BLOCK)))
    width = triton.cdiv(triton.cdiv(columns, parts), BLOCK) * BLOCK
    parts = triton.cdiv(columns, width)
    tops, sums = torch.empty(2, n, parts, dtype=torch.float32, device=logits.device)
    out = torch.empty(n, dtype=torch.float32, device=logits.device)
    _part_sums[(n, parts)](logits, tops, sums, columns, logits.stride(0), width, BLOCK=BLOCK, num_warps=4)
    _nll[(n,)](logits, labels.contiguous(), tops, sums, out, logits.stride(0), parts, PARTS=PARTS, num_warps=2)
    return out
