"""One token's attention over a ring of cached keys, for captured graphs.

Nothing here depends on numbers the host knows: which slot is written and how many are valid follow from a token
counter in device memory, so that one captured launch serves every step.

The ring of a layer has ``capacity`` slots: the first ``sinks`` tokens stay in theirs for ever, the others go
round through the rest. Sinks are kept as they arrived; the query that meets them has been turned for them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.kernels.turn import Turn

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without
    triton = None

SLOTS, WARPS = 64, 4  # cache slots that one program reads, and with how many warps


@dataclass
class Ring:
    """Keys and values of one layer, ``(Hkv, capacity, D)``, and the token counter, int64, shape ``(1,)``.

    ``turn`` is what a query undergoes before it meets the sinks.
    """

    keys: Tensor
    values: Tensor
    counter: Tensor
    sinks: int
    turn: Turn

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]


def attend_ring(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Write the token's key and value ``(Hkv, D)`` into ``ring`` and attend to all of it with ``query`` ``(H, D)``.

    Returns:
        ``(H, D)`` in the dtype of ``query``.
    """
    if triton is not None and query.is_cuda:
        return _attend_triton(ring, scale, query, key, value)
    return _attend_torch(ring, scale, query, key, value)


def _attend_torch(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same in plain torch: the reference that the kernel is tested against."""
    t, capacity, sinks = ring.counter, ring.capacity, ring.sinks
    slot = torch.where(t < capacity, t, sinks + (t - sinks) % max(capacity - sinks, 1))
    ring.keys.index_copy_(1, slot, key[:, None])
    ring.values.index_copy_(1, slot, value[:, None])
    heads, dim = query.shape
    groups = [q.view(key.shape[0], -1, dim).float() for q in (query, ring.turn(query))]
    keys = ring.keys.float().transpose(1, 2)
    place = torch.arange(capacity, device=query.device)
    scores = torch.where(place < sinks, groups[1] @ keys, groups[0] @ keys) * scale
    shares = scores.masked_fill(place > t, -math.inf).softmax(-1)
    return (shares @ ring.values.float()).view(heads, -1).to(query.dtype)


if triton is not None:

    @triton.jit
    def _read_slots(  # noqa: ANN202
        query,  # noqa: ANN001
        cos,  # noqa: ANN001
        sin,  # noqa: ANN001
        partner,  # noqa: ANN001
        key,  # noqa: ANN001
        value,  # noqa: ANN001
        keys,  # noqa: ANN001
        values,  # noqa: ANN001
        counter,  # noqa: ANN001
        partial,  # noqa: ANN001
        maxima,  # noqa: ANN001
        sums,  # noqa: ANN001
        scale,  # noqa: ANN001
        sinks,  # noqa: ANN001
        capacity,  # noqa: ANN001
        splits,  # noqa: ANN001
        HAS_SINKS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        SLOTS: tl.constexpr,
    ):
        head, split = tl.program_id(0), tl.program_id(1)
        t = tl.load(counter)
        slot = tl.where(t < capacity, t, (sinks + (t - sinks) % tl.maximum(capacity - sinks, 1)).to(tl.int64)).to(
            tl.int32
        )
        count = tl.minimum(t + 1, capacity)
        rows = split * SLOTS + tl.arange(0, SLOTS)
        d = tl.arange(0, WIDTH)
        inside = d < DIM
        # one head's part of a ring stays below 2^31 elements: offsets of 32 bits spare registers
        keys += head.to(tl.int64) * capacity * DIM
        values += head.to(tl.int64) * capacity * DIM
        at = rows[:, None] * DIM + d[None, :]
        seen = rows < count
        old = (seen & (rows != slot))[:, None] & inside[None, :]
        new = (rows == slot)[:, None] & inside[None, :]
        fresh_key = tl.load(key + head * DIM + d, mask=inside, other=0.0)
        fresh_value = tl.load(value + head * DIM + d, mask=inside, other=0.0)
        k = tl.load(keys + at, mask=old, other=0.0)
        v = tl.load(values + at, mask=old, other=0.0)
        k = tl.where(new, fresh_key[None, :], k)
        v = tl.where(new, fresh_value[None, :], v)
        tl.store(keys + at, k, mask=new)
        tl.store(values + at, v, mask=new)
        k = k.to(tl.float32)
        v = v.to(tl.float32)
        if HAS_SINKS:
            turn_cos = tl.load(cos + d, mask=inside, other=1.0)
            turn_sin = tl.load(sin + d, mask=inside, other=0.0)
            other = tl.load(partner + d, mask=inside, other=0)
        for g in tl.static_range(GROUP):
            h = head * GROUP + g
            q = tl.load(query + h * DIM + d, mask=inside, other=0.0).to(tl.float32)
            score = tl.sum(k * q[None, :], axis=1)
            if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
                if split * SLOTS < sinks:
                    across = tl.load(query + h * DIM + other, mask=inside, other=0.0).to(tl.float32)
                    turned = q * turn_cos + across * turn_sin
                    score = tl.where(rows < sinks, tl.sum(k * turned[None, :], axis=1), score)
            score = score * scale
            score = tl.where(seen, score, -1.0e30)
            top = tl.max(score, axis=0)
            share = tl.where(seen, tl.exp(score - top), 0.0)
            out = tl.sum(share[:, None] * v, axis=0)
            place = h * splits + split
            tl.store(partial + place * WIDTH + d, out)
            tl.store(maxima + place, top)
            tl.store(sums + place, tl.sum(share, axis=0))

    @triton.jit
    def _join_splits(  # noqa: ANN202
        partial,  # noqa: ANN001
        maxima,  # noqa: ANN001
        sums,  # noqa: ANN001
        out,  # noqa: ANN001
        splits,  # noqa: ANN001
        DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        SPLITS: tl.constexpr,
    ):
        head = tl.program_id(0)
        s = tl.arange(0, SPLITS)
        d = tl.arange(0, WIDTH)
        there = s < splits
        top = tl.load(maxima + head * splits + s, mask=there, other=-1.0e30)
        weight = tl.exp(top - tl.max(top, axis=0))
        weight = tl.where(there, weight, 0.0)
        total = tl.sum(weight * tl.load(sums + head * splits + s, mask=there, other=0.0), axis=0)
        parts = tl.load(partial + (head * splits + s)[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        joined = tl.sum(parts * weight[:, None], axis=0) / total
        tl.store(out + head * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)


def _attend_triton(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads, dim = query.shape
    kv_heads = key.shape[0]
    width, splits = triton.next_power_of_2(dim), triton.cdiv(ring.capacity, SLOTS)
    partial = query.new_empty(heads, splits, width, dtype=torch.float32)
    maxima, sums = (query.new_empty(heads, splits, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    _read_slots[(kv_heads, splits)](
        query,
        ring.turn.cos,
        ring.turn.sin,
        ring.turn.partner,
        key,
        value,
        ring.keys,
        ring.values,
        ring.counter,
        partial,
        maxima,
        sums,
        scale,
        ring.sinks,
        ring.capacity,
        splits,
        HAS_SINKS=ring.sinks > 0,
        GROUP=heads // kv_heads,
        DIM=dim,
        WIDTH=width,
        SLOTS=SLOTS,
        num_warps=WARPS,
    )
    _join_splits[(heads,)](
        partial, maxima, sums, out, splits, DIM=dim, WIDTH=width, SPLITS=triton.next_power_of_2(splits), num_warps=4
    )
    return out
