"""Numbers through GGUF's blocks and back, as :mod:`sinkbench.cache.formats` says it, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 64  # that a program takes


@triton.jit
def _read_back(
    x, out, count, in_row, rows, heads, x_stream, x_head, x_row,
    Q8: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)).to(tl.int64)
    row, part = block // in_row, block % in_row
    base = (row // (rows * heads)) * x_stream + (row // rows % heads) * x_head + row % rows * x_row + part * SIZE
    i = tl.arange(0, SIZE)[None, :]
    there = (block < count)[:, None]
    number = tl.load(x + base[:, None] + i, mask=there, other=0.0).to(tl.float32)
    # what is not a number is the largest of its block, as torch has it
    size = tl.where(number == number, tl.abs(number), float("inf"))  # noqa: PLR0124
    largest = tl.max(size, axis=1)
    if Q8:
        scale = tl.div_rn(largest, 127.0)
    else:
        at = tl.min(tl.where(size == largest[:, None], i, SIZE), axis=1)
        scale = tl.sum(tl.where(i == at[:, None], number, 0.0), axis=1) * -0.125
    exact = number * tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, scale))[:, None]
    if Q8:
        whole = tl.floor(tl.abs(exact))
        code = whole + tl.floor(2.0 * (tl.abs(exact) - whole))  # half away from zero
        code = tl.where(exact < 0.0, -code, code)
        code = tl.where((code == code) & (tl.abs(code) != float("inf")), code, 0.0)  # noqa: PLR0124
    else:
        code = tl.where(exact == exact, exact + 8.5, 8.0)  # noqa: PLR0124
        code = tl.floor(tl.minimum(tl.maximum(code, 0.0), 15.0)) - 8.0
    decoded = (code + 0.0) * scale.to(tl.float16).to(tl.float32)[:, None]
    tl.store(out + block[:, None] * SIZE + i, decoded.to(out.dtype.element_ty), mask=there)


def read_back(x: Tensor, size: int, eight_bits: bool) -> Tensor | None:
    """``x``, ``(B, H, n, D)``, as it comes back from blocks of ``size`` numbers.

    ``None`` for another shape, with a gradient, or in float64.
    """
    if x.dim() != 4 or x.stride(-1) != 1 or not x.numel() or x.shape[-1] % size:
        return None
    if x.requires_grad or x.element_size() == 8:
        return None
    _, heads, rows, dim = x.shape
    out = x.new_empty(x.shape)
    count = x.numel() // size
    _read_back[(triton.cdiv(count, BLOCKS),)](
        *(x, out, count, dim // size, rows, heads, *x.stride()[:3]),
        **{"Q8": eight_bits, "SIZE": size, "BLOCKS": BLOCKS, "num_warps": 4},
        enable_fp_fusion=False,  # each operation rounds, as torch's do
    )
    return out
