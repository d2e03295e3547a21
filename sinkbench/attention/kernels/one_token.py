"""One token's turn at a ring (:mod:`sinkbench.attention.kernels.ring`), as one Triton launch.

Each program reads a few slots for a few query heads that share them; the last program of these heads to come that far
puts their results together. What lies in the ring is read before the launch waits for the one that makes the query.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.attention.kernels.ring import Ring

SLOTS, WARPS = 32, 2  # cache slots that one program reads, and with how many warps
HEADS = 8  # query heads of one program, at most
JOINED = 32  # programs whose results are put together at a time


@triton.jit
def _score(k, query, at, d, inside, partner, turn_cos, turn_sin, scale, cap, rows, sinks, begin, HAS_SINKS: tl.constexpr, CAP: tl.constexpr):  # fmt: skip  # noqa: E501
    """Scores of the slots ``rows`` with the query head that begins at ``at``."""
    q = tl.load(query + at + d, mask=inside, other=0.0).to(tl.float32) * scale
    score = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
    if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
        if begin < sinks:
            across = tl.load(query + at + partner, mask=inside, other=0.0).to(tl.float32) * scale
            turned = q * turn_cos + across * turn_sin
            score = tl.where(rows < sinks, tl.sum(k.to(tl.float32) * turned[None, :], axis=1), score)
    return _capped(score, cap, CAP)


@triton.jit
def _capped(score, cap, CAP: tl.constexpr):
    if CAP:
        score = cap * (1.0 - 2.0 / (tl.exp(2.0 * score / cap) + 1.0))
    return score


@triton.jit
def _attend_slots(
    query, cos, sin, partner, key, value, keys, values, counter, arrivals, partial, maxima, sums, terms, extra, out,
    scale, cap, sinks, capacity, splits, block, ranks, group, parts,
    HAS_SINKS: tl.constexpr, BLOCKS: tl.constexpr, CAP: tl.constexpr, TERMS: tl.constexpr, GAP: tl.constexpr,
    EXTRA: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr, JOINED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    head, split = tl.program_id(0) // parts, tl.program_id(1)
    own = (tl.program_id(0) % parts) * HEADS  # the first of its heads in the group
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
    new_key = tl.load(key + head * DIM + d, mask=inside, other=0.0)
    new_value = tl.load(value + head * DIM + d, mask=inside, other=0.0)
    if split == 0 and own == 0:
        tl.store(keys + slot * DIM + d, new_key, mask=inside)
        tl.store(values + slot * DIM + d, new_value, mask=inside)
    turn_cos, turn_sin, other = d, d, d
    if HAS_SINKS:
        turn_cos = tl.load(cos + d, mask=inside, other=1.0)
        turn_sin = tl.load(sin + d, mask=inside, other=0.0)
        other = tl.load(partner + d, mask=inside, other=0)
    for g in tl.static_range(HEADS):
        if own + g < group:
            h = head * group + own + g
            score = _score(
                k, query, h * DIM, d, inside, other, turn_cos, turn_sin, scale, cap, rows, sinks, split * SLOTS,
                HAS_SINKS, CAP,
            )  # fmt: skip
            if TERMS:
                if GAP:
                    score += tl.load(terms + h) * (token - t.to(tl.int32)).to(tl.float32)
                else:
                    rank = tl.where(rows < sinks, token, token - dropped)
                    score += tl.load(terms + h * ranks + rank, mask=seen, other=0.0)
            score = tl.where(seen, score, -1.0e30)
            top = tl.max(score, axis=0)
            share = tl.where(seen, tl.exp(score - top), 0.0)
            place = h * splits + split
            tl.store(partial + place * WIDTH + d, tl.sum(share[:, None] * v.to(tl.float32), axis=0))
            tl.store(maxima + place, top)
            tl.store(sums + place, tl.sum(share, axis=0))
    # the program of some heads that is the last to come this far puts all results of those heads together
    tl.debug_barrier()
    if tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") == splits - 1:
        tl.store(arrivals + tl.program_id(0), 0)
        for i in range(HEADS):
            if own + i < group:
                at_head = head * group + own + i
                q = tl.load(query + at_head * DIM + d, mask=inside, other=0.0).to(tl.float32) * scale
                mine = _capped(tl.sum(new_key.to(tl.float32) * q, axis=0), cap, CAP)  # it meets itself unturned
                if TERMS and not GAP:
                    mine += tl.load(terms + at_head * ranks + t.to(tl.int32) - dropped)
                each = tl.arange(0, SPLITS)
                tops = tl.load(maxima + at_head * splits + each, mask=each < splits, other=-1.0e30, volatile=True)
                top = tl.maximum(tl.max(tops, axis=0), mine)
                total = tl.exp(mine - top)
                joined = total * new_value.to(tl.float32)
                if EXTRA:
                    logit = tl.load(extra + at_head).to(tl.float32)
                    above = tl.maximum(top, logit)
                    joined *= tl.exp(top - above)
                    total = total * tl.exp(top - above) + tl.exp(logit - above)
                    top = above
                for begin in range(0, splits, JOINED):
                    s = begin + tl.arange(0, JOINED)
                    some = s < splits
                    places = at_head * splits + s
                    weight = tl.exp(tl.load(maxima + places, mask=some, other=-1.0e30, volatile=True) - top)
                    parts_of = tl.load(
                        partial + places[:, None] * WIDTH + d[None, :], mask=some[:, None], other=0.0, volatile=True
                    )
                    total += tl.sum(weight * tl.load(sums + places, mask=some, other=0.0, volatile=True), axis=0)
                    joined += tl.sum(parts_of * weight[:, None], axis=0)
                tl.store(out + at_head * DIM + d, (joined / total).to(out.dtype.element_ty), mask=inside)


def attend(
    ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor, softcap: float, extra: Tensor | None
) -> Tensor:
    """As :func:`sinkbench.attention.kernels.ring.attend_plainly`."""
    (heads, dim), kv_heads = query.shape, key.shape[0]
    group = heads // kv_heads
    together = min(group, HEADS)
    parts = triton.cdiv(group, together)
    width, splits = triton.next_power_of_2(dim), triton.cdiv(max(ring.capacity - 1, 1), SLOTS)
    partial = query.new_empty(heads, splits, width, dtype=torch.float32)
    maxima, sums = (query.new_empty(heads, splits, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    turn, terms = ring.rotation, ring.terms
    _attend_slots[(kv_heads * parts, splits)](
        *(query.contiguous(), turn.cos, turn.sin, turn.partner, key.contiguous(), value.contiguous()),
        *(ring.keys, ring.values, ring.counter, ring.arrivals, partial, maxima, sums),
        *(maxima if terms is None else terms, maxima if extra is None else extra, out),
        *(scale, softcap, ring.sinks, ring.capacity, splits, ring.block),
        *(0 if terms is None else terms.shape[1], group, parts),
        **{"HAS_SINKS": ring.sinks > 0, "BLOCKS": ring.block > 1, "CAP": softcap > 0, "TERMS": terms is not None},
        **{"GAP": ring.gap, "EXTRA": extra is not None, "HEADS": together, "DIM": dim, "WIDTH": width},
        **{"SLOTS": SLOTS, "SPLITS": triton.next_power_of_2(splits), "JOINED": JOINED, "num_warps": WARPS},
        **overlapping(query),
    )
    return out
