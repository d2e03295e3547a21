"""One token's turn at a ring (:mod:`sinkbench.attention.kernels.ring`), as one Triton launch.

Each program reads a few slots for one query head; the last program of a head to come that far puts its results
together. What lies in the ring is read before the launch waits for the one that makes the query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.angles import Angles, Layout
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.attention.kernels.pairs import paired
from sinkbench.attention.kernels.ring import Ring
from sinkbench.attention.kernels.softmax import capped

SLOTS = 64  # cache slots that one program reads: the fastest of those tried on an H200
JOINED = 32  # programs whose results are put together at a time


@triton.jit
def _attend_slots(
    query, cos, sin, partner, key, value, keys, values, counter, arrivals, partial, maxima, sums, terms, extra, out,
    angle_cos, angle_sin, query_stride, key_stride, value_stride, rotating,
    scale, cap, sinks, capacity, splits, block, ranks, group,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, HAS_SINKS: tl.constexpr,
    BLOCKS: tl.constexpr, CAP: tl.constexpr, TERMS: tl.constexpr, GAP: tl.constexpr, EXTRA: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, SPLITS: tl.constexpr, JOINED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    h, split = tl.program_id(0), tl.program_id(1)
    head = h // group  # of keys and values
    t = tl.load(counter)
    d = tl.arange(0, WIDTH)
    inside = d < DIM
    # one head's part of a ring stays below 2^31 elements: offsets of 32 bits spare registers
    keys += head.to(tl.int64) * capacity * DIM
    values += head.to(tl.int64) * capacity * DIM
    rest = tl.maximum(capacity - sinks, 1)
    slot = tl.where(t < capacity, t.to(tl.int32), sinks + (t - sinks).to(tl.int32) % rest)
    # the slot that the new token takes is not read, and nobody waits for it to be written
    rows = split * SLOTS + tl.arange(0, SLOTS)
    seen = rows < tl.minimum(t, capacity - 1).to(tl.int32)
    rows += (rows >= slot).to(tl.int32)
    dropped = 0
    token = rows
    if BLOCKS or TERMS:
        token = tl.where(rows < sinks, rows, t.to(tl.int32) - (slot - rows + rest) % rest)
        over = tl.maximum(t.to(tl.int32) - (capacity - 1), 0)
        dropped = (over + block - 1) // block * block
    if BLOCKS:  # of those that lie in the ring, the oldest may be gone
        seen = seen & ((rows < sinks) | (token >= sinks + dropped))
    there = seen[:, None] if WIDTH == DIM else seen[:, None] & inside[None, :]
    at = rows[:, None] * DIM + d[None, :]
    k = tl.load(keys + at, mask=there, other=0.0)
    v = tl.load(values + at, mask=there, other=0.0)
    wait_for_last(OVERLAP)
    query += h * query_stride
    key += head * key_stride
    new_key = tl.load(key + d, mask=inside, other=0.0)
    new_value = tl.load(value + head * value_stride + d, mask=inside, other=0.0)
    q = tl.load(query + d, mask=inside, other=0.0)
    if TURN:
        low, other, angle, other_angle = paired(d, rotating, INTERLEAVED, BY_PAIR)
        turning = d < rotating
        cosine = tl.load(angle_cos + angle, mask=turning, other=1.0).to(tl.float32)
        sine = tl.load(angle_sin + angle, mask=turning, other=0.0).to(tl.float32)
        sine = tl.where(low, -sine, sine)
        opposite = tl.load(key + other, mask=turning, other=0.0).to(tl.float32)
        new_key = (new_key.to(tl.float32) * cosine + opposite * sine).to(new_value.dtype)
        before, opposite = q.to(tl.float32), tl.load(query + other, mask=turning, other=0.0).to(tl.float32)
        q = (before * cosine + opposite * sine).to(new_value.dtype)
    if split == 0 and h % group == 0:
        tl.store(keys + slot * DIM + d, new_key, mask=inside)
        tl.store(values + slot * DIM + d, new_value, mask=inside)
    q = q.to(tl.float32) * scale
    score = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
    if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
        if split * SLOTS < sinks:
            if TURN:  # the pairs are the same
                cosine = tl.load(angle_cos + other_angle, mask=turning, other=1.0).to(tl.float32)
                sine = tl.load(angle_sin + other_angle, mask=turning, other=0.0).to(tl.float32)
                across = (opposite * cosine + tl.where(low, before, -before) * sine).to(new_value.dtype)
            else:
                across = tl.load(query + tl.load(partner + d, mask=inside, other=0), mask=inside, other=0.0)
            across = across.to(tl.float32) * scale
            turned = q * tl.load(cos + d, mask=inside, other=1.0) + across * tl.load(sin + d, mask=inside, other=0.0)
            score = tl.where(rows < sinks, tl.sum(k.to(tl.float32) * turned[None, :], axis=1), score)
    score = capped(score, cap, CAP)
    own = capped(tl.sum(new_key.to(tl.float32) * q, axis=0), cap, CAP)  # a new token meets itself unturned
    if TERMS:
        if GAP:
            score += tl.load(terms + h) * (token - t.to(tl.int32)).to(tl.float32)
        else:
            rank = tl.where(rows < sinks, token, token - dropped)
            score += tl.load(terms + h * ranks + rank, mask=seen, other=0.0)
            own += tl.load(terms + h * ranks + t.to(tl.int32) - dropped)
    score = tl.where(seen, score, -1.0e30)
    top = tl.max(score, axis=0)
    share = tl.where(seen, tl.exp(score - top), 0.0)
    place = h * splits + split
    tl.store(partial + place * WIDTH + d, tl.sum(share[:, None] * v.to(tl.float32), axis=0))
    tl.store(maxima + place, top)
    tl.store(sums + place, tl.sum(share, axis=0))
    # the program of a head that is the last to come this far puts all results of that head together
    tl.debug_barrier()
    if tl.atomic_add(arrivals + h, 1, sem="acq_rel") == splits - 1:
        tl.store(arrivals + h, 0)
        each = tl.arange(0, SPLITS)
        tops = tl.load(maxima + h * splits + each, mask=each < splits, other=-1.0e30, volatile=True)
        highest = tl.maximum(tl.max(tops, axis=0), own)
        if EXTRA:
            highest = tl.maximum(highest, tl.load(extra + h).to(tl.float32))
        total = tl.exp(own - highest)
        joined = total * new_value.to(tl.float32)
        if EXTRA:
            total += tl.exp(tl.load(extra + h).to(tl.float32) - highest)
        for begin in range(0, splits, JOINED):
            s = begin + tl.arange(0, JOINED)
            some = s < splits
            places = h * splits + s
            weight = tl.exp(tl.load(maxima + places, mask=some, other=-1.0e30, volatile=True) - highest)
            parts = tl.load(
                partial + places[:, None] * WIDTH + d[None, :], mask=some[:, None], other=0.0, volatile=True
            )
            total += tl.sum(weight * tl.load(sums + places, mask=some, other=0.0, volatile=True), axis=0)
            joined += tl.sum(parts * weight[:, None], axis=0)
        tl.store(out + h * DIM + d, (joined / total).to(out.dtype.element_ty), mask=inside)


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
    width, splits = triton.next_power_of_2(dim), triton.cdiv(max(ring.capacity - 1, 1), SLOTS)
    partial = query.new_empty(heads, splits, width, dtype=torch.float32)
    maxima, sums = (query.new_empty(heads, splits, dtype=torch.float32) for _ in range(2))
    out = query.new_empty(heads, dim)
    turn, terms = ring.rotation, ring.terms
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    layout = angles.layout if angles else Layout(False, False, False)
    _attend_slots[(heads, splits)](
        *(query, turn.cos, turn.sin, turn.partner, key, value),
        *(ring.keys, ring.values, ring.counter, ring.arrivals, partial, maxima, sums),
        *(maxima if terms is None else terms, maxima if extra is None else extra, out),
        *((angles.cos, angles.sin) if angles else (turn.cos, turn.sin)),
        *(query.stride(0), key.stride(0), value.stride(0), angles.rotating if angles else 0),
        *(scale, softcap, ring.sinks, ring.capacity, splits, ring.block),
        *(0 if terms is None else terms.shape[1], heads // key.shape[0]),
        **{"TURN": angles is not None, "INTERLEAVED": layout.interleaved, "BY_PAIR": layout.by_pair},
        **{"HAS_SINKS": ring.sinks > 0, "BLOCKS": ring.block > 1, "CAP": softcap > 0, "TERMS": terms is not None},
        **{"GAP": ring.gap, "EXTRA": extra is not None, "DIM": dim, "WIDTH": width, "SLOTS": SLOTS},
        **{"SPLITS": triton.next_power_of_2(splits), "JOINED": JOINED, "num_warps": 2 if dim <= 128 else 4},
        **overlapping(query),
    )
    return out
