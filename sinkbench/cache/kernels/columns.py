"""What is held and what is new side by side, and what is alive of it back where it is held: a launch each."""

import triton
import triton.language as tl
from torch import Tensor

from sinkbench.cache.columns import Columns

NUMBERS = 4096  # of keys that a program moves
AT_ONCE = 1024  # columns that it counts at once
PASSING = ["first", "held", "n", "m"]  # differ from chunk to chunk, for which nothing need be compiled anew


@triton.jit
def _put(
    old, new, out, j, held, end, new_row, DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows ``j`` of ``out``: those of ``old``, of which there are ``held``, then those of ``new``."""
    d = tl.arange(0, WIDTH)
    there = (d < DIM)[None, :]
    before, behind = (j < held)[:, None], ((j >= held) & (j < end))[:, None]
    x = tl.load(old + j[:, None] * DIM + d[None, :], mask=before & there, other=0.0)
    y = tl.load(new + (j - held)[:, None] * new_row + d[None, :], mask=behind & there, other=0.0)
    tl.store(out + j[:, None] * DIM + d[None, :], tl.where(before, x, y), mask=(j < end)[:, None] & there)


@triton.jit(do_not_specialize=PASSING)
def _join(
    held_keys, new_keys, keys, held_values, new_values, values, held_tokens, tokens, held_memory, memory,
    held, first, m, heads,
    held_key_stream, held_key_head, held_value_stream, held_value_head, held_stream, held_head,
    key_stream, key_head, key_row, value_stream, value_head, value_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    MEMORY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    of = tl.program_id(1).to(tl.int64)
    stream, head = of // heads, of % heads
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _put(
        held_keys + stream * held_key_stream + head * held_key_head, new_keys + stream * key_stream + head * key_head,
        keys + of * m * DIM, j, held, m, key_row, DIM, WIDTH,
    )  # fmt: skip
    _put(
        held_values + stream * held_value_stream + head * held_value_head,
        new_values + stream * value_stream + head * value_head,
        values + of * m * VALUE_DIM, j, held, m, value_row, VALUE_DIM, VALUE_WIDTH,
    )  # fmt: skip
    place = stream * held_stream + head * held_head + j
    token = tl.load(held_tokens + place, mask=j < held, other=0)
    tl.store(tokens + of * m + j, tl.where(j < held, token, first + j - held), mask=j < m)
    if MEMORY:
        carried = tl.load(held_memory + place, mask=j < held, other=0.0)
        tl.store(memory + of * m + j, carried, mask=j < m)


@triton.jit
def _move(source, out, j, place, moved, DIM: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    mask = moved[:, None] & (d < DIM)[None, :]
    row = tl.load(source + j[:, None] * DIM + d[None, :], mask=mask, other=0.0)
    tl.store(out + place[:, None] * DIM + d[None, :], row, mask=mask)


@triton.jit(do_not_specialize=PASSING)
def _keep(
    keys, held_keys, values, held_values, tokens, held_tokens, memory, held_memory, died,
    n, held, m, heads, held_key_stream, held_key_head, held_value_stream, held_value_head, held_stream, held_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    MEMORY: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    of = tl.program_id(1).to(tl.int64)
    stream, head = of // heads, of % heads
    begin = tl.program_id(0) * BLOCK
    died += of * m
    counts = tl.zeros((AT_ONCE,), tl.int32)
    for start in range(0, begin, AT_ONCE):  # how many of those before these columns are alive
        at = start + tl.arange(0, AT_ONCE)
        counts += (tl.load(died + at, mask=at < begin, other=-1) >= n).to(tl.int32)
    j = begin + tl.arange(0, BLOCK)
    alive = tl.load(died + j, mask=j < m, other=-1) >= n
    place = tl.sum(counts, axis=0) + tl.cumsum(alive.to(tl.int32), axis=0) - 1
    moved = alive & (place < held)
    held_keys += stream * held_key_stream + head * held_key_head
    held_values += stream * held_value_stream + head * held_value_head
    _move(keys + of * m * DIM, held_keys, j, place, moved, DIM, WIDTH)
    _move(values + of * m * VALUE_DIM, held_values, j, place, moved, VALUE_DIM, VALUE_WIDTH)
    slot = stream * held_stream + head * held_head + place
    tl.store(held_tokens + slot, tl.load(tokens + of * m + j, mask=moved, other=0), mask=moved)
    if MEMORY:
        tl.store(held_memory + slot, tl.load(memory + of * m + j, mask=moved, other=0.0), mask=moved)


def join(slots: Columns, keys: Tensor, values: Tensor, first: int) -> Columns | None:
    """As :func:`sinkbench.cache.columns.join`; ``None`` for more than one number in memory, slots with gaps, or
    with gradients."""
    if not _takes(slots) or keys.requires_grad or values.requires_grad:
        return None
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    batch, heads, n, dim = keys.shape
    m = slots.held + n
    columns = Columns(
        keys.new_empty(batch, heads, m, dim),
        values.new_empty(batch, heads, m, values.shape[-1]),
        slots.tokens.new_empty(batch, heads, m),
        {name: x.new_empty(batch, heads, m) for name, x in slots.memory.items()},
        slots.held,
    )
    carried, memory = (_carried(x) for x in (slots, columns))
    sizes = _sizes(slots)
    _join[(triton.cdiv(m, sizes["BLOCK"]), batch * heads)](
        *(slots.keys, keys, columns.keys, slots.values, values, columns.values, slots.tokens, columns.tokens),
        *(carried, memory, slots.held, first, m, heads, *_strides(slots)),
        *(*keys.stride()[:3], *values.stride()[:3]),
        **sizes,
    )
    return columns


def keep(columns: Columns, died: Tensor, slots: Columns) -> Columns | None:
    """As :func:`sinkbench.cache.columns.keep`, and answers with ``slots``; ``None`` as :func:`join`."""
    if not _takes(slots):
        return None
    batch, heads, m = columns.tokens.shape
    sizes = _sizes(slots)
    _keep[(triton.cdiv(m, sizes["BLOCK"]), batch * heads)](
        *(columns.keys, slots.keys, columns.values, slots.values, columns.tokens, slots.tokens),
        *(_carried(columns), _carried(slots), died.contiguous(), m - columns.held, slots.held, m, heads),
        *_strides(slots),
        **sizes,
        AT_ONCE=AT_ONCE,
    )
    return slots


def _takes(slots: Columns) -> bool:
    keys, values, tokens = slots.keys, slots.values, slots.tokens
    dense = keys.stride()[2:] == (keys.shape[3], 1) and values.stride()[2:] == (values.shape[3], 1)
    alike = all(x.stride() == tokens.stride() for x in slots.memory.values())
    return len(slots.memory) <= 1 and dense and alike and tokens.stride(2) == 1


def _carried(columns: Columns) -> Tensor:
    """What is carried for each entry; where nothing is, something that is not read."""
    return next(iter(columns.memory.values()), columns.tokens)


def _strides(slots: Columns) -> tuple[int, ...]:
    return *slots.keys.stride()[:2], *slots.values.stride()[:2], *slots.tokens.stride()[:2]


def _sizes(slots: Columns) -> dict[str, int | bool]:
    dim, value_dim = slots.keys.shape[-1], slots.values.shape[-1]
    widths = triton.next_power_of_2(dim), triton.next_power_of_2(value_dim)
    return {
        **{"DIM": dim, "WIDTH": widths[0], "VALUE_DIM": value_dim, "VALUE_WIDTH": widths[1]},
        **{"MEMORY": bool(slots.memory), "BLOCK": max(16, NUMBERS // max(widths)), "num_warps": 4},
    }
