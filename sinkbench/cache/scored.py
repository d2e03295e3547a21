"""A layer whose entries go by a score: slots in no particular order, and which token lies in each.

A token that is evicted leaves its slot to the next, so nothing is ever moved. Every head of keys and values may hold
other tokens. Keys lie as they came (``text`` positions), or unrotated, to be turned on every step to their rank among
those that their head holds (``cache`` positions).

Many tokens at once (``text`` positions alone) join behind what is held, and are attended to as *columns*; which of them
died at which token is for the attention to find (:mod:`sinkbench.attention.scan`), and what is alive then is kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinkbench.cache.formats import keys_read_back, read_back
from sinkbench.cache.scoring import scores_of
from sinkbench.cache.trace import Trace
from sinkbench.errors import UserError
from sinkbench.positions.rotary import Rope, wide
from sinkbench.positions.rotation import Moves
from sinkbench.strategies import Held, LayerPlan


@dataclass
class Columns:
    """What the queries of a chunk may attend to: what was held before it, then its own tokens.

    Attributes:
        keys: ``(B, H, m, D)``; ``values`` likewise.
        tokens: index in the text of each, int64, ``(B, H, m)``.
        memory: what the strategy carries for each, ``(B, H, m)``.
        held: how many were held before; the same in every head.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    memory: dict[str, Tensor]
    held: int


class ScoredLayer(CacheLayerMixin):
    """One layer's keys and values, of which the strategy evicts one a step once the window is full.

    Shapes: ``B`` streams, ``H`` heads of keys and values, ``n`` entries with the newest, ``D`` features.

    Args:
        plan: how much survives a step, and where it stands.
        rope: how this layer's keys turn with position; ``None`` where they do not.
        number: of this layer among those that the strategy governs.
    """

    supports_early_init = False
    is_sliding = False
    trace: Trace | None = None  # is told what goes, of the first stream

    def __init__(self, plan: LayerPlan, rope: Rope | None, number: int) -> None:
        super().__init__()
        self.plan, self.rope, self.number = plan, rope, number
        self.policy = plan.policy
        self.moves = Moves()  # a cache gives all its layers one
        assert self.policy.window is not None
        assert self.policy.eviction is not None
        self.window, self.eviction = self.policy.window, self.policy.eviction
        self.seen = 0  # tokens that passed
        self.position = 0  # of the next token, as the model is told
        self.memory: dict[str, Tensor] = {}
        self.columns: Columns | None = None  # of a chunk that is being read
        self.reads_chunks = False  # whether the attention knows how (sinkbench.attention)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        (batch, heads, _, dim), slots = key_states.shape, self.window + 1
        stored = self.dtype if self.plan.positions == "text" else wide(self.dtype)
        self.keys = key_states.new_zeros(batch, heads, slots, dim, dtype=stored)
        self.values = value_states.new_zeros(batch, heads, slots, value_states.shape[-1])
        self.tokens = torch.zeros(batch, heads, slots, dtype=torch.long, device=self.device)  # index in the text
        self.free = torch.zeros(batch, heads, 1, dtype=torch.long, device=self.device)  # the slot of the next token
        self.ranks = torch.zeros_like(self.tokens)  # place in text order among those that the head holds
        self.memory = {
            name: torch.zeros(batch, heads, slots, dtype=wide(self.dtype), device=self.device)
            for name in self.eviction.memory
        }
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add ``(B, H, n, D)`` keys and values; answer with all that are held, the new ones among them.

        Raises:
            UserError: several tokens at once where they cannot be read so.
        """
        n = key_states.shape[-2]
        if n > 1 and not (self.reads_chunks and self.plan.positions == "text"):
            raise UserError("a strategy that scores its entries reads one token at a time: use --engine stepwise")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rope = self.rope and self._rope
        key_states = keys_read_back(self.plan.format, key_states, rope, self.seen - self.position)
        value_states = read_back(self.plan.format, value_states)
        if n > 1:
            return self._join(key_states, value_states)
        if self.plan.positions == "cache" and self.rope is not None:
            key_states = self.moves.move(self._rope, key_states.to(self.keys.dtype), -self.position)
        place = self.free[..., None]
        self.keys.scatter_(2, place.expand_as(key_states), key_states.to(self.keys.dtype))
        self.values.scatter_(2, place.expand_as(value_states), value_states)
        self.tokens.scatter_(2, self.free, self.seen)
        if self.plan.positions == "cache":
            self.ranks.scatter_(2, self.free, self.held)
        for numbers in self.memory.values():
            numbers.scatter_(2, self.free, 0.0)
        self.seen += 1
        self.position += 1
        self.view = self._turned(self.keys[:, :, : self.present])
        return self.view, self.values[:, :, : self.present]

    def _join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of a chunk: what is held, and the new tokens."""
        if self.seen > self.window:  # the last slot's entry moves to the one that is free
            for x in (self.keys, self.values, self.tokens, *self.memory.values()):
                x.scatter_(2, _along(self.free, x), x[:, :, self.window :].clone())
        held, n = self.held, keys.shape[2]
        new = torch.arange(self.seen, self.seen + n, device=self.device).expand(*keys.shape[:2], -1)
        nothing = {name: x.new_zeros(*keys.shape[:2], n) for name, x in self.memory.items()}
        self.columns = Columns(
            torch.cat((self.keys[:, :, :held], keys), 2),
            torch.cat((self.values[:, :, :held], values), 2),
            torch.cat((self.tokens[:, :, :held], new), 2),
            {name: torch.cat((x[:, :, :held], nothing[name]), 2) for name, x in self.memory.items()},
            held,
        )
        self.seen += n
        self.position += n
        return self.columns.keys, self.columns.values

    def keep(self, died: Tensor) -> None:
        """End a chunk: keep the columns that are alive.

        Args:
            died: for each column the index in the chunk of the last query that attends to it, int64, ``(B, H, m)``;
                the number of queries for those that are held after it.
        """
        columns, held = self.columns, self.held
        assert columns is not None
        n = columns.tokens.shape[2] - columns.held
        if self.trace is not None:
            steps = torch.where(died < n, died + (self.seen - n), -1)
            self.trace.note_many(self.number, columns.tokens[0], steps[0])
        alive = torch.sort((died < n).to(torch.int8), stable=True).indices[:, :, :held]
        self.keys[:, :, :held] = columns.keys.gather(2, _along(alive, columns.keys))
        self.values[:, :, :held] = columns.values.gather(2, _along(alive, columns.values))
        self.tokens[:, :, :held] = columns.tokens.gather(2, alive)
        for name, numbers in columns.memory.items():
            self.memory[name][:, :, :held] = numbers.gather(2, alive)
        self.free.fill_(held)
        self.columns = None

    @property
    def _rope(self) -> Rope:
        assert self.rope is not None
        return self.rope.at_length(self.position + 1)

    def _turned(self, keys: Tensor) -> Tensor:
        """The keys where the newest query meets them."""
        if self.plan.positions == "text" or self.rope is None:
            return keys
        newest = self.position - 1  # where the query stands; every head holds as many entries, and it is the last
        places = self.ranks[:, :, : self.present] + (newest - self.present + 1)
        return self.moves.move_each(self.rope.at_length(self.position), keys, places, newest).to(self.dtype)

    @property
    def present(self) -> int:
        """Entries that the newest token attends to, itself included."""
        return min(self.seen, self.window + 1)

    @property
    def held(self) -> int:
        """Entries kept for the next step."""
        return min(self.seen, self.window)

    def evict(self, weights: Tensor) -> None:
        """Choose what goes, after the attention of a step.

        Args:
            weights: shares of the newest query in each entry, ``(B, H, G, n)``.
        """
        n = self.present
        tokens = self.tokens[:, :, :n]
        held = Held(
            tokens=tokens,
            now=self.seen - 1,
            memory={name: numbers[:, :, :n] for name, numbers in self.memory.items()},
            layer=self.number,
            look=lambda: weights,
            keys_of=lambda: self.view,
        )
        scores = scores_of(self.eviction, held)
        if n <= self.window:
            self.free.fill_(n)
            return
        first, last = self.policy.sinks, self.seen - self.policy.protected
        self.free = lowest(scores, tokens, first, last, held.now, self.eviction.tolerance)
        if self.plan.positions == "cache":
            self.ranks -= (self.ranks > self.ranks.gather(2, self.free)).long()
        if self.trace is not None:
            self.trace.note(self.number, held.now, tokens.gather(2, self.free)[0, :, 0])

    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values kept for the next step, each ``(B, H, held, D)``, those of a head in no particular order."""
        slots = torch.arange(self.present, device=self.device).expand(*self.free.shape[:2], -1)
        kept = slots[slots != self.free].view(*slots.shape[:2], -1) if self.present > self.held else slots
        return self.keys.gather(2, _along(kept, self.keys)), self.values.gather(2, _along(kept, self.values))

    def __getstate__(self) -> dict[str, Any]:
        """Without what the last step saw."""
        return {name: value for name, value in vars(self).items() if name != "view"}

    def shift(self, by: int) -> None:
        """Move every position by ``by``: those of the cache follow from ranks, those of the text never move."""
        self.position += by

    def settle(self) -> None:
        """Nothing to give back."""

    def get_seq_length(self) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_max_length(self) -> int:
        return self.window

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("a cache that drops entries cannot be rolled back (assisted decoding needs that)")

    def reset(self) -> None:
        self.seen = self.position = 0
        self.columns = None
        if self.is_initialized:
            self.free.zero_()

    def _map(self, pick) -> None:  # noqa: ANN001
        if not self.is_initialized:
            return
        for name in ("keys", "values", "tokens", "ranks", "free"):
            setattr(self, name, pick(getattr(self, name)))
        self.memory = {name: pick(numbers) for name, numbers in self.memory.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])


def _along(index: Tensor, x: Tensor) -> Tensor:
    """``index``, ``(B, H, n)``, for gathering from ``x``, ``(B, H, m)`` or ``(B, H, m, D)``."""
    return index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, x.shape[-1])


def lowest(scores: Tensor, tokens: Tensor, first: int, last: int, now: int, tolerance: float = 0.0) -> Tensor:
    """Where the entry with the lowest score lies, ``(B, H, 1)``; of equal ones, the oldest.

    Args:
        scores: ``(B, H, n)``, or ``(B, 1, n)`` for all heads.
        tokens: indices in the text, ``(B, H, n)``; only those from ``first`` on and before ``last`` can go.
        now: the index of the newest.
        tolerance: scores above the lowest by no more than this share of its magnitude are equal to it.
    """
    if first == 0 and last > now:
        return _oldest_lowest(scores.expand(tokens.shape), tokens, tolerance)
    stays = tokens >= last
    if first:
        stays |= tokens < first
    most = torch.iinfo(torch.long).max
    return _oldest_lowest(scores.masked_fill(stays, torch.inf), tokens.masked_fill(stays, most), tolerance)


def _oldest_lowest(scores: Tensor, tokens: Tensor, tolerance: float) -> Tensor:
    low = scores.amin(-1, keepdim=True)
    if tolerance:
        low = torch.fmax(low, torch.add(low, low.abs(), alpha=tolerance))  # an infinite lowest has no neighbours
    return tokens.masked_fill(scores > low, torch.iinfo(torch.long).max).argmin(-1, keepdim=True)
