"""One token's turn at a ring (:mod:`sinkbench.attention.kernels.ring`), as two Triton launches.

Each program of the first reads a few slots for one query head, before it waits for the launch that makes the query; a
program of the second puts some features of a head together. One launch, in which the last program of a head did that,
took longer: it had to fence what it had written, and to load what others had, while the next launch's programs, which
wait for it, had the memory busy with matrices.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.angles import Angles, Layout
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.attention.kernels.pairs import turned
from sinkbench.attention.kernels.ring import Ring
from sinkbench.attention.kernels.softmax import capped

SLOTS = 32  # cache slots that one program reads: the fastest of those tried on an H200
HELD = 512  # bytes of keys and values that a thread holds while it waits
JOINED = 128  # results that are put together at a time
NARROWEST, WIDEST = 32, 64  # features that are computed with at a time


@triton.jit
def _features(x, cos, sin, d, inside, rotating, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr):
    """Features ``d`` of one head, turned, where they are to turn first."""
    if TURN:
        return turned(x, cos, sin, d, inside, rotating, INTERLEAVED, BY_PAIR)
    return tl.load(x + d, mask=inside, other=0.0)


@triton.jit
def _asking(
    query, cos, sin, partner, angle_cos, angle_sin, d, inside, rotating, of_sinks,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Features ``d`` of a query, in float32; where it meets sinks, turned for these."""
    q = _features(query, angle_cos, angle_sin, d, inside, rotating, TURN, INTERLEAVED, BY_PAIR).to(tl.float32)
    if HAS_SINKS:
        some = inside & of_sinks
        other = tl.load(partner + d, mask=some, other=0).to(tl.int32)
        across = _features(query, angle_cos, angle_sin, other, some, rotating, TURN, INTERLEAVED, BY_PAIR)
        q = q * tl.load(cos + d, mask=some, other=1.0)
        q += across.to(tl.float32) * tl.load(sin + d, mask=some, other=0.0)
    return q


@triton.jit
def _enter(
    query, key, value, key_out, value_out, mixed, top, total, cos, sin, rotating, scale, cap, term, writes,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, CAP: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A new token meets itself, unturned for sinks, and its key and value go into their slot."""
    products = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(0, DIM, WIDTH):
        d = i + tl.arange(0, WIDTH)
        inside = d < DIM
        q = _features(query, cos, sin, d, inside, rotating, TURN, INTERLEAVED, BY_PAIR)
        k = _features(key, cos, sin, d, inside, rotating, TURN, INTERLEAVED, BY_PAIR)
        v = tl.load(value + d, mask=inside, other=0.0)
        products += q.to(tl.float32) * k.to(tl.float32)
        tl.store(mixed + d, v.to(tl.float32), mask=inside)
        if writes:
            tl.store(key_out + d, k, mask=inside)
            tl.store(value_out + d, v, mask=inside)
    tl.store(top, capped(tl.sum(products, axis=0) * scale, cap, CAP) + term)
    tl.store(total, 1.0)


@triton.jit
def _attend_slots(
    query, cos, sin, partner, key, value, keys, values, counter, mixed, tops, sums, terms, angle_cos, angle_sin,
    query_stride, key_stride, value_stride, rotating, scale, cap, sinks, capacity, sink_splits, block, ranks, group,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCKS: tl.constexpr, CAP: tl.constexpr, TERMS: tl.constexpr, GAP: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    h, split = tl.program_id(0), tl.program_id(1)
    head = h // group  # of keys and values
    t = tl.load(counter)
    # one head's part of a ring stays below 2^31 elements: offsets of 32 bits spare registers
    keys += head.to(tl.int64) * capacity * DIM
    values += head.to(tl.int64) * capacity * DIM
    rest = tl.maximum(capacity - sinks, 1)
    slot = tl.where(t < capacity, t.to(tl.int32), sinks + (t - sinks).to(tl.int32) % rest)
    place = h * tl.num_programs(1) + split
    over = tl.maximum(t.to(tl.int32) - (capacity - 1), 0)
    dropped = (over + block - 1) // block * block
    if split == tl.num_programs(1) - 1:
        term = 0.0
        if TERMS and not GAP:
            term = tl.load(terms + h * ranks + t.to(tl.int32) - dropped)
        wait_for_last(OVERLAP)
        _enter(
            query + h * query_stride, key + head * key_stride, value + head * value_stride,
            keys + slot * DIM, values + slot * DIM, mixed + place * DIM, tops + place, sums + place,
            angle_cos, angle_sin, rotating, scale, cap, term, h % group == 0,
            TURN, INTERLEAVED, BY_PAIR, CAP, DIM, WIDTH,
        )  # fmt: skip
        return
    # sinks have programs of their own: these meet a query that is turned for them
    of_sinks = split < sink_splits
    rows = tl.where(of_sinks, split * SLOTS, sinks + (split - sink_splits) * SLOTS) + tl.arange(0, SLOTS)
    seen = rows < tl.minimum(t, tl.where(of_sinks, sinks, capacity - 1)).to(tl.int32)
    # the slot that the new token takes is not read, and nobody waits for it to be written
    rows += (rows >= slot).to(tl.int32)
    token = rows
    if BLOCKS or TERMS:
        token = tl.where(of_sinks, rows, t.to(tl.int32) - (slot - rows + rest) % rest)
    if BLOCKS:  # of those that lie in the ring, the oldest may be gone
        seen = seen & (of_sinks | (token >= sinks + dropped))
    held_keys, held_values = (), ()
    for i in tl.static_range(0, DIM, WIDTH):
        d = i + tl.arange(0, WIDTH)
        there = seen[:, None] if i + WIDTH <= DIM else seen[:, None] & (d < DIM)[None, :]
        at = rows[:, None] * DIM + d[None, :]
        held_keys = held_keys + (tl.load(keys + at, mask=there, other=0.0),)  # type: ignore[assignment]
        held_values = held_values + (tl.load(values + at, mask=there, other=0.0),)  # type: ignore[assignment]
    wait_for_last(OVERLAP)
    query += h * query_stride
    products = tl.zeros([SLOTS, WIDTH], tl.float32)
    for i in tl.static_range(0, DIM, WIDTH):
        d = i + tl.arange(0, WIDTH)
        q = _asking(
            query, cos, sin, partner, angle_cos, angle_sin, d, d < DIM, rotating, of_sinks,
            TURN, INTERLEAVED, BY_PAIR, HAS_SINKS,
        )  # fmt: skip
        products += held_keys[i // WIDTH].to(tl.float32) * q[None, :]
    score = capped(tl.sum(products, axis=1) * scale, cap, CAP)
    if TERMS:
        if GAP:
            score += tl.load(terms + h) * (token - t.to(tl.int32)).to(tl.float32)
        else:
            rank = tl.where(of_sinks, token, token - dropped)
            score += tl.load(terms + h * ranks + rank, mask=seen, other=0.0)
    score = tl.where(seen, score, -1.0e30)
    top = tl.max(score, axis=0)
    share = tl.where(seen, tl.exp(score - top), 0.0)
    tl.store(tops + place, top)
    tl.store(sums + place, tl.sum(share, axis=0))
    for i in tl.static_range(0, DIM, WIDTH):
        d = i + tl.arange(0, WIDTH)
        part = tl.sum(share[:, None] * held_values[i // WIDTH].to(tl.float32), axis=0)
        tl.store(mixed + place * DIM + d, part, mask=d < DIM)


@triton.jit
def _put_together(
    mixed, tops, sums, extra, out, splits,
    EXTRA: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    h = tl.program_id(0)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = d < DIM
    highest, total = -1.0e30, 0.0
    if EXTRA:
        highest, total = tl.load(extra + h).to(tl.float32), 1.0
    joined = tl.zeros([WIDTH], tl.float32)
    wait_for_last(OVERLAP)
    for begin in range(0, splits, JOINED):
        split = begin + tl.arange(0, JOINED)
        there, place = split < splits, h * splits + split
        top = tl.load(tops + place, mask=there, other=-1.0e30)
        each = tl.load(sums + place, mask=there, other=0.0)
        at = place[:, None] * DIM + d[None, :]
        part = tl.load(mixed + at, mask=there[:, None] & inside[None, :], other=0.0)
        higher = tl.maximum(highest, tl.max(top, axis=0))
        shrink, weight = tl.exp(highest - higher), tl.exp(top - higher)
        total = total * shrink + tl.sum(weight * each, axis=0)
        joined = joined * shrink + tl.sum(weight[:, None] * part, axis=0)
        highest = higher
    tl.store(out + h * DIM + d, (joined / total).to(out.dtype.element_ty), mask=inside)


def _width(dim: int) -> int:
    """Features at a time: as many as there can be, of which a quarter at most are none."""
    width = min(WIDEST, triton.next_power_of_2(dim))
    while width > NARROWEST and -dim % width > dim // 4:
        width //= 2
    return width


def attend(
    ring: Ring,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float,
    extra: Tensor | None,
    angles: Angles | None = None,
) -> Tensor:
    """As :func:`sinkbench.attention.kernels.ring.attend_plainly`; heads need not lie one behind the other.

    Args:
        angles: by which the query and the key are to turn first, of pairs that are those of the ring's rotation.
    """
    heads, dim = query.shape
    sink_splits = triton.cdiv(ring.sinks, SLOTS)
    splits = sink_splits + triton.cdiv(ring.capacity - 1 - ring.sinks, SLOTS) + 1  # of the new token
    mixed = query.new_empty(heads, splits, dim, dtype=torch.float32)
    tops, sums = (query.new_empty(heads, splits, dtype=torch.float32) for _ in range(2))
    out = query.new_empty(heads, dim)
    turn, terms = ring.rotation, ring.terms
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    layout = angles.layout if angles else Layout(False, False, False)
    width, common = _width(dim), overlapping(query)
    held = 2 * SLOTS * triton.cdiv(dim, width) * width * query.element_size()
    launch(
        _attend_slots,
        (heads, splits),
        *(query, turn.cos, turn.sin, turn.partner, key, value, ring.keys, ring.values, ring.counter, mixed, tops, sums),
        *(tops if terms is None else terms, *((angles.cos, angles.sin) if angles else (turn.cos, turn.sin))),
        *(query.stride(0), key.stride(0), value.stride(0), angles.rotating if angles else 0, scale, softcap),
        *(ring.sinks, ring.capacity, sink_splits, ring.block, 0 if terms is None else terms.shape[1]),
        heads // key.shape[0],
        **{"TURN": angles is not None, "INTERLEAVED": layout.interleaved, "BY_PAIR": layout.by_pair},
        **{"HAS_SINKS": ring.sinks > 0, "BLOCKS": ring.block > 1, "CAP": softcap > 0, "TERMS": terms is not None},
        **{"GAP": ring.gap, "DIM": dim, "WIDTH": width, "SLOTS": SLOTS},
        **{"num_warps": max(1, triton.next_power_of_2(held) // (32 * HELD)), **common},
    )
    joined = min(JOINED, triton.next_power_of_2(splits))
    launch(
        _put_together,
        (heads, triton.cdiv(dim, NARROWEST)),
        *(mixed, tops, sums, tops if extra is None else extra, out, splits),
        **{"EXTRA": extra is not None, "DIM": dim, "WIDTH": NARROWEST, "JOINED": joined},
        **{"num_warps": triton.cdiv(joined, 32), **common},
    )
    return out
