"""Attention to a band of recent keys, many queries at once, whose scores are more than products: one Triton program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.softmax import capped, with_columns, with_values
from sinkbench.attention.scores import Scores
from sinkbench.strategies import LayerPlan


@triton.jit
def _attend(
    query, key, value, terms, out, logs, scale, cap, first, begin, n, m, heads, groups, window, sinks, block, ranks,
    query_stream, query_head, query_row, key_stream, key_head, key_row, value_stream, value_head, value_row,
    BOUNDED: tl.constexpr, CAP: tl.constexpr, TERMS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    stream, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1).to(tl.int64) % heads
    of = head // groups
    start = tl.program_id(0) * ROWS
    rows = start + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    at = query + stream * query_stream + head * query_head + rows.to(tl.int64)[:, None] * query_row
    q = tl.load(at + d[None, :], mask=(rows < n)[:, None] & (d < DIM)[None, :], other=0.0)
    key += stream * key_stream + of * key_head
    value += stream * value_stream + of * value_head
    now = first + rows
    dropped = tl.zeros((ROWS,), tl.int32)
    lowest = 0
    if BOUNDED:
        dropped = (tl.maximum(now - window, 0) + block - 1) // block * block
        lowest = sinks + (tl.maximum(first + start - window, 0) + block - 1) // block * block - begin
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    slope, base = 0.0, 0.0
    if (TERMS == "rank") | (TERMS == "distance"):
        slope, base = tl.load(terms + 2 * head), tl.load(terms + 2 * head + 1)
    end = tl.minimum(first - begin + start + ROWS, m)
    for c in range(tl.maximum(lowest, 0) // COLUMNS * COLUMNS, end, COLUMNS):
        j = c + tl.arange(0, COLUMNS)
        token = begin + j
        there = (j < m)[:, None] & (d < DIM)[None, :]
        k = tl.load(key + j.to(tl.int64)[:, None] * key_row + d[None, :], mask=there, other=0.0)
        x = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        x = capped(x, cap, CAP)
        if TERMS == "distance":
            x += slope * (token[None, :] - now[:, None]).to(tl.float32)
        if TERMS == "rank":
            x += base + slope * (token[None, :] - dropped[:, None]).to(tl.float32)
        if TERMS == "table":
            rank = tl.minimum(tl.maximum(token[None, :] - dropped[:, None], 0), ranks - 1)
            x += tl.load(terms + head * ranks + rank)
        seen = (token[None, :] <= now[:, None]) & (j < m)[None, :]
        if BOUNDED:
            seen = seen & (token[None, :] >= sinks + dropped[:, None])
        x = tl.where(seen, x, float("-inf"))
        top, total, shares, shrink = with_columns(x, top, total)
        v = tl.load(value + j.to(tl.int64)[:, None] * value_row + d[None, :], mask=there, other=0.0)
        sums = with_values(sums, shrink, shares, v, PRECISION)
    some = tl.where(total > 0.0, total, 1.0)
    place = ((stream * n + rows.to(tl.int64)) * heads + head)[:, None] * DIM + d[None, :]
    tl.store(
        out + place, (sums / some[:, None]).to(out.dtype.element_ty), mask=(rows < n)[:, None] & (d < DIM)[None, :]
    )
    log = tl.where(total > 0.0, top + tl.log(some), float("-inf"))
    tl.store(logs + (stream * heads + head) * n + rows, log, mask=rows < n)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether these queries and values are for this kernel."""
    return query.is_cuda and query.dtype != torch.float64 and value.shape[-1] == query.shape[-1] <= 256


def attend(
    query: Tensor, key: Tensor, value: Tensor, first: int, begin: int, plan: LayerPlan, scores: Scores
) -> tuple[Tensor, Tensor]:
    """As :func:`sinkbench.attention.bands.band`; the output lies as ``(B, n, H, D)``."""
    batch, heads, n, dim = query.shape
    policy, m = plan.policy, key.shape[2]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    out = query.new_empty(batch, n, heads, dim).transpose(1, 2)
    logs = query.new_empty(batch, heads, n, dtype=torch.float32)
    terms, kind = _terms(plan, scores, first + n)
    rows, columns, warps, stages, precision = _shape(query)
    _attend[(triton.cdiv(n, rows), batch * heads)](
        *(query, key, value, logs if terms is None else terms, out, logs, scores.scale, scores.softcap or 0.0),
        *(first, begin, n, m, heads, heads // key.shape[1], policy.window or 0, policy.sinks, policy.block),
        *(1 if terms is None else terms.shape[1], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3]),
        **{"BOUNDED": policy.window is not None, "CAP": scores.softcap is not None, "TERMS": kind},
        **{"DIM": dim, "WIDTH": max(16, triton.next_power_of_2(dim)), "ROWS": rows, "COLUMNS": columns},
        **{"PRECISION": precision, "num_warps": warps, "num_stages": stages},
    )
    return out, logs


def _shape(query: Tensor) -> tuple[int, int, int, int, str]:
    """Rows and columns at a time, warps, stages, and how numbers are multiplied.

    Of float32 tensor cores multiply three parts (``tf32x3``): on an H200 three times as fast as its other units do it,
    and with smaller errors than torch's products of float32 (results/h200/README.md).
    """
    half, dim = query.element_size() == 2, query.shape[-1]
    if half:
        return (128, 64, 8, 3, "ieee") if dim <= 128 else (64, 64, 4, 2, "ieee")
    if dim <= 64:
        return 64, 64, 4, 2, "tf32x3"
    return (32, 32, 4, 2, "tf32x3") if dim <= 128 else (16, 32, 4, 1, "tf32x3")


def _terms(plan: LayerPlan, scores: Scores, end: int) -> tuple[Tensor | None, str]:
    """What ALiBi adds: by a position of distance or of rank, or, where that is rounded, by a table of ranks."""
    alibi = scores.alibi
    if alibi is None:
        return None, "none"
    window = plan.policy.window
    table = alibi.table(end if window is None else window + 1).float()
    if plan.gap or alibi.linear:
        return torch.stack((alibi.slopes.float(), table[:, 0]), dim=1), "distance" if plan.gap else "rank"
    return table.contiguous(), "table"
