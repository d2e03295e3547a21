"""One token's attention over a ring of cached keys, for captured graphs.

Nothing here depends on numbers the host knows: which slot is written and how many are valid follow from a token
counter in device memory, so that one captured launch serves every step.

The ring of a layer has ``capacity`` slots, one more than entries survive a step: the first ``sinks`` tokens stay in
theirs for ever, the others go round through the rest. Sinks are kept as they arrived; the query that meets them has
been turned for them. Where several entries go at once (:attr:`Policy.block`), those that are gone lie there unread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.attention.kernels import kernels
from sinkbench.attention.kernels.angles import Angles, Layout
from sinkbench.attention.scores import shares_of
from sinkbench.compilers import compiled_for
from sinkbench.positions.rotary import wide
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Policy


@dataclass
class Ring:
    """Keys and values of one layer, ``(Hkv, capacity, D)``, and the token counter, int64, shape ``(1,)``.

    Attributes:
        sinks: slots that are never written again.
        rotation: what a query undergoes before it meets the sinks.
        block: entries that go at once.
        terms: what ALiBi adds to the scores, float32: by an entry's rank, ``(H, ranks)``; where ``gap``, by one
            position more, ``(H, 1)``; ``None`` elsewhere.
        gap: whether terms go by distances in the text.
    """

    keys: Tensor
    values: Tensor
    counter: Tensor
    sinks: int
    rotation: Rotation
    block: int = 1
    terms: Tensor | None = None
    gap: bool = False

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


def attend_ring(
    ring: Ring,
    scale: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    softcap: float | None = None,
    extra: Tensor | None = None,
    angles: Angles | None = None,
) -> Tensor:
    """Write the token's key and value ``(Hkv, D)`` into ``ring`` and attend to all of it with ``query`` ``(H, D)``.

    Args:
        softcap: as in :class:`sinkbench.attention.scores.Scores`; ``extra``, ``(H,)``, likewise.
        angles: by which the query and the key have yet to turn; only where there are kernels for the device.

    Returns:
        ``(H, D)`` in the dtype of ``query``.
    """
    turn = ring.rotation
    by = (None, None, None) if angles is None else (angles.cos, angles.sin, list(angles.layout))
    return torch.ops.sinkbench.attend_ring(
        *(ring.keys, ring.values, ring.counter, turn.cos, turn.sin, turn.partner, ring.terms, extra),
        *(query, key, value, scale, softcap or 0.0, ring.sinks, ring.block, ring.gap, *by),
    )


@torch.library.custom_op("sinkbench::attend_ring", mutates_args=("keys", "values"))
def _attend(
    keys: Tensor,
    values: Tensor,
    counter: Tensor,
    cos: Tensor,
    sin: Tensor,
    partner: Tensor,
    terms: Tensor | None,
    extra: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    sinks: int,
    block: int,
    gap: bool,
    angle_cos: Tensor | None,
    angle_sin: Tensor | None,
    layout: Sequence[bool] | None,
) -> Tensor:
    ring = Ring(keys, values, counter, sinks, Rotation(cos, sin, partner), block, terms, gap)
    one = ring, scale, query, key, value, softcap, extra
    if angle_cos is not None and angle_sin is not None and layout is not None:
        return kernels("one_token").attend(*one, Angles(angle_cos, angle_sin, Layout(*layout)))
    fused = kernels("one_token") if compiled_for(query) and query.dtype != torch.float64 else None
    return fused.attend(*one) if fused else attend_plainly(*one)


@_attend.register_fake
def _(keys, values, counter, cos, sin, partner, terms, extra, query, *rest):
    return query.new_empty(query.shape)


def attend_plainly(
    ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor, softcap: float, extra: Tensor | None
) -> Tensor:
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
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    token = torch.where(place < sinks, place, t - (slot - place) % max(capacity - sinks, 1))
    policy = Policy(capacity - 1 or None, min(sinks, max(capacity - 2, 0)), ring.block)
    if ring.terms is not None:
        rank = torch.where(place < sinks, token, token - policy.dropped(t)).clamp(0, ring.terms.shape[1] - 1)
        terms = ring.terms * (token - t) if ring.gap else ring.terms[:, rank]
        scores = scores + terms.view(*groups[0].shape[:2], -1)
    gone = (place >= sinks) & (token < sinks + policy.dropped(t))
    scores = scores.masked_fill((place > t) | gone, -math.inf)
    shares = shares_of(scores, None if extra is None else extra.view(groups[0].shape[:2]).to(scores.dtype))
    return (shares @ ring.values.to(wide(query.dtype))).view(heads, -1).to(query.dtype)
