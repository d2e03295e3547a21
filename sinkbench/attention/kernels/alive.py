"""Attention of a chunk's queries to the columns that are alive at each of them, in one pass, as a Triton program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.softmax import with_columns, with_values


@triton.jit
def _attend(
    query, key, value, died, extra, out, scale, held, n, m, heads, groups,
    query_stream, query_head, query_row, out_stream, out_head, out_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXTRA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stream, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    there = (rows < n)[:, None] & (d < DIM)[None, :]
    base = query + stream * query_stream + head * query_head + rows.to(tl.int64)[:, None] * query_row
    q = tl.load(base + d[None, :], mask=there, other=0.0)
    of = stream * (heads // groups) + head // groups  # the head of keys and values
    key += of * m * DIM
    value += of * m * DIM
    died += of * m
    accurate = out.dtype.element_ty if out.dtype.element_ty == tl.float64 else tl.float32
    top = tl.full((ROWS,), float("-inf"), accurate)
    total = tl.zeros((ROWS,), accurate)
    sums = tl.zeros((ROWS, WIDTH), accurate)
    end = tl.minimum(held + tl.program_id(0) * ROWS + ROWS, m)
    for start in range(0, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k = tl.load(key + j[None, :] * DIM + d[:, None], mask=(j < m)[None, :] & (d < DIM)[:, None], other=0.0)
        x = tl.dot(q, k, input_precision=PRECISION, out_dtype=accurate) * scale
        last = tl.load(died + j, mask=j < m, other=-1).to(tl.int32)
        seen = (j[None, :] - held <= rows[:, None]) & (last[None, :] >= rows[:, None])
        x = tl.where(seen, x, float("-inf"))
        top, total, shares, shrink = with_columns(x, top, total)
        v = tl.load(value + j[:, None] * DIM + d[None, :], mask=(j < m)[:, None] & (d < DIM)[None, :], other=0.0)
        sums = with_values(sums, shrink, shares, v, PRECISION)
    if EXTRA:
        total += tl.exp(tl.load(extra + head).to(accurate) - top)
    place = out + stream * out_stream + head * out_head + rows.to(tl.int64)[:, None] * out_row + d[None, :]
    tl.store(place, (sums / total[:, None]).to(out.dtype.element_ty), mask=there)


def attend(
    query: Tensor, key: Tensor, value: Tensor, died: Tensor, held: int, scale: float, extra: Tensor | None
) -> Tensor:
    """``(B, A, n, D)``, laid out as ``(B, n, A, D)``, for queries ``(B, A, n, D)``.

    Args:
        key: columns ``(B, H, m, D)``; ``value`` likewise, with as many features.
        died: the last query that attends to each column, ``(B, H, m)``.
        held: columns that the first query found there.
        extra: a logit that joins each softmax, ``(A,)``.
    """
    batch, heads, n, dim = query.shape
    m = key.shape[2]
    if query.stride(-1) != 1:
        query = query.contiguous()
    out = query.new_empty(batch, n, heads, dim).transpose(1, 2)
    rows, columns, warps, precision = _shape(query)
    _attend[(triton.cdiv(n, rows), batch * heads)](
        *(query, key.contiguous(), value.contiguous(), died.contiguous()),
        *(extra if extra is not None else query, out, scale, held, n, m, heads, heads // key.shape[1]),
        *(query.stride(0), query.stride(1), query.stride(2), out.stride(0), out.stride(1), out.stride(2)),
        **{"DIM": dim, "WIDTH": max(16, triton.next_power_of_2(dim)), "ROWS": rows, "COLUMNS": columns},
        **{"EXTRA": extra is not None, "PRECISION": precision, "num_warps": warps},
    )
    return out


def _shape(query: Tensor) -> tuple[int, int, int, str]:
    """Rows and columns at a time, warps, and how numbers are multiplied (as in the band of kernels/band.py)."""
    if query.element_size() == 2:
        return 64, 64, 4, "ieee"
    if query.dtype == torch.float64:
        return 32, 32, 4, "ieee"
    return 32 if query.shape[-1] <= 128 else 16, 64 if query.shape[-1] <= 64 else 32, 4, "tf32x3"
