"""One token's attention over a ring of cached keys, for captured graphs.

Nothing here depends on numbers the host knows: which slot is written and how many are valid follow from a token
counter in device memory, so that one captured launch serves every step.

The ring of a layer has ``capacity`` slots, one more than entries survive a step: the first ``sinks`` tokens stay in
theirs for ever, the others go round through the rest. Sinks are kept as they arrived; the query that meets them has
been turned for them. Where several entries go at once (:attr:`Policy.block`), those that are gone lie there unread.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.positions.rotary import wide
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Policy

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU build of torch comes without
    triton = None

SLOTS, WARPS = 32, 2  # cache slots that one program reads, and with how many warps
JOINED = 32  # programs whose results are put together at a time


@dataclass
class Ring:
    """Keys and values of one layer, ``(Hkv, capacity, D)``, and the token counter, int64, shape ``(1,)``.

    ``rotation`` is what a query undergoes before it meets the sinks. ``block`` entries go at once. ``arrivals``, int32,
    shape ``(Hkv,)``, is all zeros between two steps.
    """

    keys: Tensor
    values: Tensor
    counter: Tensor
    sinks: int
    rotation: Rotation
    block: int = 1
    arrivals: Tensor | None = None

    def __post_init__(self) -> None:
        if self.arrivals is None:
            self.arrivals = torch.zeros(self.keys.shape[0], dtype=torch.int32, device=self.keys.device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def slots(self, tokens: Tensor) -> Tensor:
        """Where the tokens with these indices (int64, shape ``(n,)``) lie."""
        return slots_of(tokens, self.capacity, self.sinks)


def slots_of(tokens: Tensor, capacity: int, sinks: int) -> Tensor:
    """Where the tokens with these indices lie in a ring."""
    rest = max(capacity - sinks, 1)
    return torch.where(tokens < capacity, tokens, sinks + (tokens - sinks) % rest)


def attend_ring(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Write the token's key and value ``(Hkv, D)`` into ``ring`` and attend to all of it with ``query`` ``(H, D)``.

    Returns:
        ``(H, D)`` in the dtype of ``query``.
    """
    turn = ring.rotation
    return torch.ops.sinkbench.attend_ring(
        *(ring.keys, ring.values, ring.arrivals, ring.counter, turn.cos, turn.sin, turn.partner),
        *(query, key, value, scale, ring.sinks, ring.block),
    )


@torch.library.custom_op("sinkbench::attend_ring", mutates_args=("keys", "values", "arrivals"))
def _attend(
    keys: Tensor,
    values: Tensor,
    arrivals: Tensor,
    counter: Tensor,
    cos: Tensor,
    sin: Tensor,
    partner: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    sinks: int,
    block: int,
) -> Tensor:
    ring = Ring(keys, values, counter, sinks, Rotation(cos, sin, partner), block, arrivals)
    if triton is not None and query.is_cuda:
        return _attend_triton(ring, scale, query, key, value)
    return attend_plainly(ring, scale, query, key, value)


@_attend.register_fake
def _(keys, values, arrivals, counter, cos, sin, partner, query, key, value, scale, sinks, block):
    return query.new_empty(query.shape)


def attend_plainly(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same in plain torch: the reference that the kernel is tested against."""
    t, capacity, sinks = ring.counter, ring.capacity, ring.sinks
    slot = ring.slots(t)
    ring.keys.index_copy_(1, slot, key[:, None])
    ring.values.index_copy_(1, slot, value[:, None])
    heads, dim = query.shape
    groups = [q.view(key.shape[0], -1, dim).to(wide(q.dtype)) for q in (query, ring.rotation(query))]
    keys = ring.keys.to(wide(query.dtype)).transpose(1, 2)
    place = torch.arange(capacity, device=query.device)
    turned = (place < sinks) & (place != slot)  # a new token meets itself unturned
    scores = torch.where(turned, groups[1] @ keys, groups[0] @ keys) * scale
    token = torch.where(place < sinks, place, t - (slot - place) % max(capacity - sinks, 1))
    policy = Policy(capacity - 1 or None, min(sinks, max(capacity - 2, 0)), ring.block)
    gone = (place >= sinks) & (token < sinks + policy.dropped(t))
    shares = scores.masked_fill((place > t) | gone, -math.inf).softmax(-1)
    return (shares @ ring.values.to(wide(query.dtype))).view(heads, -1).to(query.dtype)


if triton is not None:

    @triton.jit
    def _attend_slots(
        query,
        cos,
        sin,
        partner,
        key,
        value,
        keys,
        values,
        counter,
        arrivals,
        partial,
        maxima,
        sums,
        out,
        scale,
        sinks,
        capacity,
        splits,
        block,
        HAS_SINKS: tl.constexpr,
        BLOCKS: tl.constexpr,
        GROUP: tl.constexpr,
        DIM: tl.constexpr,
        WIDTH: tl.constexpr,
        SLOTS: tl.constexpr,
        SPLITS: tl.constexpr,
        JOINED: tl.constexpr,
    ):
        head, split = tl.program_id(0), tl.program_id(1)
        t = tl.load(counter)
        d = tl.arange(0, WIDTH)
        inside = d < DIM
        # one head's part of a ring stays below 2^31 elements: offsets of 32 bits spare registers
        keys += head.to(tl.int64) * capacity * DIM
        values += head.to(tl.int64) * capacity * DIM
        slot = tl.where(
            t < capacity, t.to(tl.int32), sinks + (t - sinks).to(tl.int32) % tl.maximum(capacity - sinks, 1)
        )
        # the slot that the new token takes is not read, and nobody waits for it to be written
        rows = split * SLOTS + tl.arange(0, SLOTS)
        seen = rows < tl.minimum(t, capacity - 1).to(tl.int32)
        rows += (rows >= slot).to(tl.int32)
        if BLOCKS:  # of those that lie in the ring, the oldest may be gone
            rest = tl.maximum(capacity - sinks, 1)
            token = t.to(tl.int32) - (slot - rows + rest) % rest
            over = tl.maximum(t.to(tl.int32) - (capacity - 1), 0)
            seen = seen & ((rows < sinks) | (token >= sinks + (over + block - 1) // block * block))
        there = seen[:, None] if WIDTH == DIM else seen[:, None] & inside[None, :]
        at = rows[:, None] * DIM + d[None, :]
        k = tl.load(keys + at, mask=there, other=0.0)
        v = tl.load(values + at, mask=there, other=0.0)
        new_key = tl.load(key + head * DIM + d, mask=inside, other=0.0)
        new_value = tl.load(value + head * DIM + d, mask=inside, other=0.0)
        if split == 0:
            tl.store(keys + slot * DIM + d, new_key, mask=inside)
            tl.store(values + slot * DIM + d, new_value, mask=inside)
        if HAS_SINKS:
            turn_cos = tl.load(cos + d, mask=inside, other=1.0)
            turn_sin = tl.load(sin + d, mask=inside, other=0.0)
            other = tl.load(partner + d, mask=inside, other=0)
        for g in tl.static_range(GROUP):
            h = head * GROUP + g
            q = tl.load(query + h * DIM + d, mask=inside, other=0.0).to(tl.float32) * scale
            score = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
            if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the next
                if split * SLOTS < sinks:
                    across = tl.load(query + h * DIM + other, mask=inside, other=0.0).to(tl.float32) * scale
                    turned = q * turn_cos + across * turn_sin
                    score = tl.where(rows < sinks, tl.sum(k.to(tl.float32) * turned[None, :], axis=1), score)
            score = tl.where(seen, score, -1.0e30)
            top = tl.max(score, axis=0)
            share = tl.where(seen, tl.exp(score - top), 0.0)
            place = h * splits + split
            tl.store(partial + place * WIDTH + d, tl.sum(share[:, None] * v.to(tl.float32), axis=0))
            tl.store(maxima + place, top)
            tl.store(sums + place, tl.sum(share, axis=0))
        # the program of a head that is the last to come this far puts all results of that head together
        tl.debug_barrier()
        if tl.atomic_add(arrivals + head, 1, sem="acq_rel") == splits - 1:
            tl.store(arrivals + head, 0)
            for g in tl.static_range(GROUP):
                h = head * GROUP + g
                q = tl.load(query + h * DIM + d, mask=inside, other=0.0).to(tl.float32) * scale
                own = tl.sum(new_key.to(tl.float32) * q, axis=0)  # a new token meets itself unturned
                each = tl.arange(0, SPLITS)
                tops = tl.load(maxima + h * splits + each, mask=each < splits, other=-1.0e30, volatile=True)
                top = tl.maximum(tl.max(tops, axis=0), own)
                total = tl.exp(own - top)
                joined = total * new_value.to(tl.float32)
                for begin in range(0, splits, JOINED):
                    s = begin + tl.arange(0, JOINED)
                    some = s < splits
                    places = h * splits + s
                    weight = tl.exp(tl.load(maxima + places, mask=some, other=-1.0e30, volatile=True) - top)
                    parts = tl.load(
                        partial + places[:, None] * WIDTH + d[None, :], mask=some[:, None], other=0.0, volatile=True
                    )
                    total += tl.sum(weight * tl.load(sums + places, mask=some, other=0.0, volatile=True), axis=0)
                    joined += tl.sum(parts * weight[:, None], axis=0)
                tl.store(out + h * DIM + d, (joined / total).to(out.dtype.element_ty), mask=inside)


def _attend_triton(ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads, dim = query.shape
    kv_heads = key.shape[0]
    width, splits = triton.next_power_of_2(dim), triton.cdiv(max(ring.capacity - 1, 1), SLOTS)
    partial = query.new_empty(heads, splits, width, dtype=torch.float32)
    maxima, sums = (query.new_empty(heads, splits, dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    turn = ring.rotation
    _attend_slots[(kv_heads, splits)](
        *(query.contiguous(), turn.cos, turn.sin, turn.partner, key.contiguous(), value.contiguous()),
        *(ring.keys, ring.values, ring.counter, ring.arrivals),
        *(partial, maxima, sums, out, scale, ring.sinks, ring.capacity, splits, ring.block),
        HAS_SINKS=ring.sinks > 0,
        BLOCKS=ring.block > 1,
        GROUP=heads // kv_heads,
        DIM=dim,
        WIDTH=width,
        SLOTS=SLOTS,
        SPLITS=triton.next_power_of_2(splits),
        JOINED=JOINED,
        num_warps=WARPS,
    )
    return out
