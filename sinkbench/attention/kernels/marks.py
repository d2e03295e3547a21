"""Which keys of a head are equal to the last bit, as Triton programs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.marks import FACTOR, words_of

COLUMNS = 64  # whose keys are compared at once


@triton.jit(do_not_specialize=["m"])
def _mark(
    words, marks, m, DIM: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, FACTOR: tl.constexpr
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    j, d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDTH)
    mask = (j < m)[:, None] & (d < DIM)[None, :]
    word = tl.load(words + head * m * DIM + j[:, None] * DIM + d[None, :], mask=mask, other=0).to(tl.int64)
    factor = ((d + 1).to(tl.int64) * FACTOR) | 1
    tl.store(marks + head * m + j, tl.sum(word * factor[None, :], axis=1), mask=j < m)


@triton.jit(do_not_specialize=["m"])
def _twins(marks, twins, m, COLUMNS: tl.constexpr):
    """Whether a column has the mark of one before it."""
    marks += tl.program_id(1).to(tl.int64) * m
    begin = tl.program_id(0) * COLUMNS
    j = begin + tl.arange(0, COLUMNS)
    mine = tl.load(marks + j, mask=j < m, other=0)
    found = tl.zeros((COLUMNS,), tl.int32)
    for start in range(0, begin + COLUMNS, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        others = tl.load(marks + k, mask=k < m, other=0)
        same = (mine[:, None] == others[None, :]) & (k[None, :] < j[:, None]) & (j < m)[:, None]
        found = tl.maximum(found, tl.max(same.to(tl.int32), axis=1))
    if tl.max(found, axis=0) > 0:
        tl.store(twins + tl.program_id(1), 1)


def marks_and_twins(keys: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`sinkbench.attention.marks.marks_of`; and whether two keys of a head are equal, int32, ``(R,)``."""
    words = words_of(keys)
    heads, m, dim = words.shape
    marks = torch.empty(heads, m, dtype=torch.int64, device=keys.device)
    twins = torch.zeros(heads, dtype=torch.int32, device=keys.device)
    grid = triton.cdiv(m, COLUMNS), heads
    width = triton.next_power_of_2(dim)
    _mark[grid](words, marks, m, DIM=dim, WIDTH=width, COLUMNS=COLUMNS, FACTOR=FACTOR, num_warps=4)
    _twins[grid](marks, twins, m, COLUMNS=COLUMNS, num_warps=4)
    return marks, twins
