"""Attention to the sinks folded into attention to the recent keys, many queries at once, in one pass over memory."""

from torch import Tensor

from sinkbench.positions.rotation import Rotation

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without
    triton = None

ROWS = 32  # queries of one program


if triton is not None:

    @triton.jit
    def _fold_sinks(
        query,
        out,
        log_sum,
        keys,
        values,
        cos,
        sin,
        partner,
        scale,
        n,
        sinks,
        heads,
        query_stream,
        query_head,
        query_row,
        out_stream,
        out_head,
        out_row,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        head = tl.program_id(1)  # of all streams
        stream, own = head.to(tl.int64) // heads, head.to(tl.int64) % heads
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        there = (rows < n)[:, None] & (d < DIM)[None, :]
        across = tl.load(partner + d, mask=d < DIM, other=0)
        base = query + stream * query_stream + own * query_head + rows.to(tl.int64)[:, None] * query_row
        q = tl.load(base + d[None, :], mask=there, other=0.0).to(tl.float32)
        other = tl.load(base + across[None, :], mask=there, other=0.0).to(tl.float32)
        angle = rows.to(tl.int64)[:, None] * DIM + d[None, :]
        q = q * tl.load(cos + angle, mask=there, other=1.0) + other * tl.load(sin + angle, mask=there, other=0.0)
        place = out + stream * out_stream + own * out_head + rows.to(tl.int64)[:, None] * out_row + d[None, :]
        top = tl.load(log_sum + head * n + rows, mask=rows < n, other=0.0)
        weight = tl.full((ROWS,), 1.0, tl.float32)
        total = tl.load(place, mask=there, other=0.0).to(tl.float32)
        for j in range(sinks):
            at = ((head // GROUP) * sinks + j) * DIM + d
            k = tl.load(keys + at, mask=d < DIM, other=0.0).to(tl.float32)
            v = tl.load(values + at, mask=d < DIM, other=0.0).to(tl.float32)
            score = tl.sum(q * k[None, :], axis=1) * scale
            new_top = tl.maximum(top, score)
            shrink = tl.exp(top - new_top)
            share = tl.exp(score - new_top)
            weight = weight * shrink + share
            total = total * shrink[:, None] + share[:, None] * v[None, :]
            top = new_top
        tl.store(place, (total / weight[:, None]).to(out.dtype.element_ty), mask=there)


def fold_sinks(
    query: Tensor, out: Tensor, log_sum: Tensor, keys: Tensor, values: Tensor, turn: Rotation, scale: float
) -> None:
    """Fold attention to the sinks into ``out`` in place: :func:`sinkbench.attention.bands._fold` in one pass, on CUDA.

    Args:
        query: ``(B, H, n, D)``, not yet turned.
        out: attention to the recent keys, ``(B, H, n, D)``.
        log_sum: the logarithm of its denominator, ``(B, H, n)``.
        keys: the sinks' keys as they arrived, ``(B, Hkv, S, D)``; ``values`` likewise.
        turn: cosines and sines ``(n, D)``.
    """
    batch, heads, n, dim = query.shape
    _fold_sinks[(triton.cdiv(n, ROWS), batch * heads)](
        query,
        out,
        log_sum.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        turn.cos,
        turn.sin,
        turn.partner,
        scale,
        n,
        keys.shape[2],
        heads,
        query.stride(0),
        query.stride(1),
        query.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        GROUP=heads // keys.shape[1],
        DIM=dim,
        WIDTH=triton.next_power_of_2(dim),
        ROWS=ROWS,
        num_warps=4,
    )
