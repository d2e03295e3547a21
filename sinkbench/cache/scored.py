"""A layer whose entries go by a score: slots in no particular order, and which token lies in each.

Every head of keys and values may hold other tokens. Keys lie as they came (``text`` positions), or unrotated, to be
turned on every step to their rank among those that their head holds (``cache`` positions). What a layer holds lies in
a :class:`~sinkbench.cache.stack.Stack`, with what others do that are like it; once the last of them has passed a step,
one entry goes in each.

Many tokens at once (``text`` positions alone) join behind what is held, and are attended to as *columns*; which of them
died at which token is for the attention to find (:mod:`sinkbench.attention.scan`), and what is alive then is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinkbench.cache.columns import Columns, join, keep
from sinkbench.cache.formats import keys_read_back, read_back
from sinkbench.cache.stack import Stack
from sinkbench.cache.trace import Trace
from sinkbench.errors import UserError
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Moves
from sinkbench.strategies import LayerPlan


@dataclass(frozen=True)
class Lane:
    """How chunks follow each other where several are under way at once (:mod:`sinkbench.engines.lanes`).

    Attributes:
        passed: happens once the layer holds what is left of a chunk.
        count: of chunks that are under way at once.
    """

    passed: torch.cuda.Event
    count: int


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
    lane: Lane | None = None  # where chunks do not simply follow each other

    def __init__(self, plan: LayerPlan, rope: Rope | None, number: int) -> None:
        self.is_initialized = False  # and nothing else of what the base says, whose keys and values are the stack's
        self.plan, self.rope, self.number = plan, rope, number
        self.policy = plan.policy
        self.moves = Moves()  # a cache gives all its layers one
        assert self.policy.window is not None
        assert self.policy.eviction is not None
        self.window, self.eviction = self.policy.window, self.policy.eviction
        blind = self.eviction.together and self.eviction.pattern in ("fixed", "alike")
        self.looks = not blind  # whether the score may look at the weights of a step
        self.row = 0
        self.stack = Stack(plan, [self])  # alone, unless a cache puts layers together
        self.seen = 0  # tokens that passed
        self.position = 0  # of the next token, as the model is told
        self.columns: Columns | None = None  # of a chunk that is being read
        self.reads_chunks = False  # whether the attention knows how (sinkbench.attention)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stack.take_in(self.row, key_states, value_states)
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
        rope = self.rope and self.rope.at_length(self.position + 1)
        key_states = keys_read_back(self.plan.format, key_states, rope, self.seen - self.position)
        value_states = read_back(self.plan.format, value_states)
        if n > 1:
            return self._join(key_states, value_states)
        if self.row == 0:
            self.stack.begin()
        place = self.stack.places[self.row]
        self.seen += 1
        self.position += 1
        place.key.copy_(key_states)
        place.value.copy_(value_states)
        return place.keys, place.values

    def _join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of a chunk: what is held, and the new tokens."""
        if self.lane is not None:
            torch.cuda.current_stream(self.device).wait_event(self.lane.passed)
        self.columns = join(self._slots(), keys, values, self.seen)
        self.seen += keys.shape[2]
        self.position += keys.shape[2]
        return self.columns.keys, self.columns.values

    def keep(self, died: Tensor) -> None:
        """End a chunk: keep the columns that are alive.

        Args:
            died: for each column the index in the chunk of the last query that attends to it, int64, ``(B, H, m)``;
                the number of queries for those that are held after it.
        """
        columns = self.columns
        assert columns is not None
        if self.trace is not None:
            n = columns.tokens.shape[2] - columns.held
            steps = torch.where(died < n, died + (self.seen - n), -1)
            self.trace.note_many(self.number, columns.tokens[0], steps[0])
        keep(columns, died, self._slots())
        self.columns = None
        if self.lane is not None:
            self.lane.passed.record(torch.cuda.current_stream(self.device))

    def _slots(self) -> Columns:
        return Columns(self.keys, self.values, self.tokens, self.memory, self.held)

    @property
    def keys(self) -> Tensor:  # type: ignore[override] # nobody sets it
        """As queries meet them, ``(B, H, slots, D)``, of which the first :attr:`held` are filled between two steps."""
        return self.stack.of(self.row, self.stack.keys)

    @property
    def values(self) -> Tensor:  # type: ignore[override] # nor this
        """As :attr:`keys`."""
        return self.stack.of(self.row, self.stack.values)

    @property
    def tokens(self) -> Tensor:
        """Index in the text of each entry, ``(B, H, slots)``."""
        return self.stack.of(self.row, self.stack.tokens)

    @property
    def ranks(self) -> Tensor:
        """Place of each entry in text order among those that its head holds, likewise; with ``cache`` positions."""
        assert self.stack.ranks is not None
        return self.stack.of(self.row, self.stack.ranks)

    @property
    def memory(self) -> dict[str, Tensor]:
        """What the strategy carries for each entry, ``(B, H, slots)``."""
        return {name: self.stack.of(self.row, numbers) for name, numbers in self.stack.memory.items()}

    @property
    def present(self) -> int:
        """Entries that the newest token attends to, itself included."""
        return min(self.seen, self.window + 1)

    @property
    def held(self) -> int:
        """Entries kept for the next step."""
        return min(self.seen, self.window)

    def evict(self, weights: Tensor | None) -> None:
        """After the attention of a step: one entry goes, once all layers of the stack have passed it.

        Args:
            weights: shares of the newest query in each entry, ``(B, H, G, n)``; may be ``None`` without :attr:`looks`.
        """
        self.stack.note(self.row, weights)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values kept for the next step, each ``(B, H, held, D)``, those of a head in no particular order."""
        keys = self.stack.keys if self.stack.unturned is None else self.stack.unturned
        keys, values = self.stack.of(self.row, keys), self.values
        return keys[:, :, : self.held].clone(), values[:, :, : self.held].clone()

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

    def _map(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Pick streams; whoever asks one layer of a stack asks all, and the first answers for them."""
        if self.is_initialized and self.row == 0:
            self.stack.map(lambda x: torch.cat([pick(own) for own in x.chunk(self.stack.depth)]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])
