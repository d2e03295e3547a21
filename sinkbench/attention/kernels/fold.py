"""Attention to the sinks folded into attention to the recent keys, many queries at once, in one pass over memory."""

from torch import Tensor

from sinkbench.positions.rotation import Rotation

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without
    triton = None

ROWS, HEADS = 16, 8  # queries of one program, and heads, which share the angles


if triton is not None:

    @triton.jit
    def _fold_sinks(
        query,
        out,
        log_sum,
        keys,
        across,
        values,
        cos,
        sin,
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
        HEADS: tl.constexpr,
    ):
        stream = tl.program_id(2).to(tl.int64)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        there = (rows < n)[:, None] & (d < DIM)[None, :]
        angle = rows.to(tl.int64)[:, None] * DIM + d[None, :]
        c = tl.load(cos + angle, mask=there, other=1.0)
        s = tl.load(sin + angle, mask=there, other=0.0)
        first = tl.program_id(1) * HEADS
        for own in range(first, tl.minimum(first + HEADS, heads)):
            asked = query + stream * query_stream + own * query_head + rows.to(tl.int64)[:, None] * query_row
            q = tl.load(asked + d[None, :], mask=there, other=0.0).to(tl.float32)
            place = out + stream * out_stream + own * out_head + rows.to(tl.int64)[:, None] * out_row + d[None, :]
            head = stream * heads + own
            top = tl.load(log_sum + head * n + rows, mask=rows < n, other=0.0)
            weight = tl.full((ROWS,), 1.0, tl.float32)
            total = tl.load(place, mask=there, other=0.0).to(tl.float32)
            for j in range(sinks):
                # once for every row, so that threads have what they need where they need it
                at = (head // GROUP * sinks + j) * DIM + d[None, :] + tl.zeros((ROWS, 1), tl.int32)
                k = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
                k_across = tl.load(across + at, mask=there, other=0.0).to(tl.float32)
                v = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
                # to turn a query is to turn the key back: partners have sines of opposite sign
                score = tl.sum(q * (c * k - s * k_across), axis=1) * scale
                new_top = tl.maximum(top, score)
                shrink = tl.exp(top - new_top)
                share = tl.exp(score - new_top)
                weight = weight * shrink + share
                total = total * shrink[:, None] + share[:, None] * v
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
    _fold_sinks[(triton.cdiv(n, ROWS), triton.cdiv(heads, HEADS), batch)](
        query,
        out,
        log_sum.contiguous(),
        keys.contiguous(),
        keys[..., turn.partner],
        values.contiguous(),
        turn.cos,
        turn.sin,
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
        HEADS=HEADS,
        num_warps=4,
    )
