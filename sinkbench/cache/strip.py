"""A layer whose entries go by position: a strip of keys and values, and a view that slides along it.

The slots of a strip stand at consecutive positions. The view is always in text order, sinks first, so that an entry's
position is its slot. Window keys never move inside the strip; the sinks are laid anew before the window on every step,
from a pristine copy turned to where the query has to meet them: work in O(sinks), and rounding never accumulates. When
the view reaches the strip's end it is copied back to the beginning, at most once in :func:`compaction_interval` steps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sinkbench.cache.formats import keys_read_back, read_back
from sinkbench.errors import UserError
from sinkbench.positions.rotary import Rope, wide
from sinkbench.positions.rotation import Moves
from sinkbench.strategies import LayerPlan, Policy
from sinkbench.strategies.formats import Format

BLOCK = 1024  # tokens by which an unbounded strip grows


def compaction_interval(policy: Policy) -> int:
    """Steps, at least, between two moves of all that is kept."""
    assert policy.recent is not None
    return 1 + max(policy.recent // 4, 32)


@dataclass
class Sinks:
    """The first tokens of a stream as they arrived: keys ``(B, H, S, D)`` at positions 0 to S - 1, and values."""

    keys: Tensor
    values: Tensor


class StripLayer(CacheLayerMixin):
    """One layer's keys and values, of which the first and the last are kept.

    Args:
        plan: what survives an update, and where it stands.
        rope: how this layer's keys turn with position; ``None`` where they do not.
    """

    supports_early_init = False

    def __init__(self, plan: LayerPlan, rope: Rope | None) -> None:
        super().__init__()
        self.plan, self.rope = plan, rope
        self.policy = plan.policy
        self.moves = Moves()  # a cache gives all its layers one
        self.as_computed = plan.format == Format()
        self.is_sliding = plan.sizes.kind == "sliding"
        self.sinks: Sinks | None = None  # set once the sinks have left their place in the strip
        self.start = self.end = 0  # slots of the window, without the sinks
        self.offset = 0  # position of slot 0
        self.seen = 0  # tokens that passed
        self.sinks_in_attention = False  # whether the attention reads the sinks itself (sinkbench.attention)
        self.keys_unrotated = False  # whether keys are kept unrotated, and every step turns every key anew

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(0)
        self.values = value_states.new_empty(0)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add ``(B, H, n, D)`` keys and values; answer with all that the new tokens may attend to, in text order.

        More than one token at a time is exact as long as nothing has to be dropped between them. Beyond that the
        attention has to know (:func:`sinkbench.attention.redirection.attending`): with ``sinks_in_attention`` set, the
        answer holds the carried window and the new tokens, and not the sinks once they have left the window.

        Raises:
            UserError: several tokens at once that plain attention would read wrongly.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, window = key_states.shape[-2], self.policy.window
        if n > 1 and not self.sinks_in_attention and window is not None and self.held + n > window + 1:
            raise UserError(
                f"{n} tokens at once do not fit a cache of {window}: feed them through a model loaded with "
                "sinkbench.AutoModelForCausalLM, or one at a time"
            )
        plain = not (self.sinks_in_attention or self.keys_unrotated or self.plan.format.recoded)
        if plain and not self.seen:
            return self._begin(key_states, value_states)
        self._make_room(key_states, value_states, n)
        position = self.end + self.offset
        if not self.as_computed:
            rope = self.rope and self.rope.at_length(position + n)
            key_states = keys_read_back(self.plan.format, key_states, rope, self.seen - position)
            value_states = read_back(self.plan.format, value_states)
        if self.keys_unrotated:
            key_states = self._turned(
                key_states, -torch.arange(position, position + n, device=self.device), position + n
            )
        lay(self.keys[:, :, self.end : self.end + n], key_states)
        lay(self.values[:, :, self.end : self.end + n], value_states)
        self.end += n
        self.seen += n
        first = self.start if self.sinks_in_attention else self._lay_sinks()
        keys, values = self.keys[:, :, first : self.end], self.values[:, :, first : self.end]
        if self.keys_unrotated:
            end = position + n  # the model's frequencies are those of a sequence of this length
            keys = self._turned(keys, torch.arange(end - keys.shape[-2], end, device=self.device), end).to(values.dtype)
        self._evict()
        return keys, values

    def _begin(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens are the strip, without a copy: a short prompt costs what it costs without a strategy."""
        keys = _of_its_own(read_back(self.plan.format, key_states))
        values = _of_its_own(read_back(self.plan.format, value_states))
        self.keys, self.values = keys, values
        self.start, self.end, self.seen = 0, keys.shape[2], keys.shape[2]
        self._evict()
        return keys, values

    def _turned(self, keys: Tensor, by: Tensor, length: int) -> Tensor:
        assert self.rope is not None
        return self.rope.at_length(length).move(keys.to(wide(keys.dtype)), by)

    def _lay_sinks(self) -> int:
        """Put the sinks into the slots just before the window; answer with the first slot of the view."""
        if self.sinks is None:
            return self.start
        first, count = self.start - self.policy.sinks, self.policy.sinks
        if count:
            keys = self.sinks.keys
            if self.rope is not None and not self.keys_unrotated:
                # in the cache, right before the window; in the text, as far from the newest token as there
                by = first + self.offset if not self.plan.gap else self.end + self.offset - self.seen
                keys = self.moves.move(self.rope, keys, by)
            self._put_sinks(keys, self.start)
        return first

    def with_sinks(self, recent: int) -> tuple[Tensor, Tensor]:
        """The last ``recent`` entries, what has just been evicted among them, behind the sinks as they arrived."""
        assert self.sinks is not None
        first = self._put_sinks(self.sinks.keys, self.end - recent)
        return self.keys[:, :, first : self.end], self.values[:, :, first : self.end]

    def _put_sinks(self, keys: Tensor, before: int) -> int:
        """Fill the free slots before this one with the sinks' ``keys`` and values; answer with the first of them."""
        assert self.sinks is not None
        first = before - self.policy.sinks
        self.keys[:, :, first:before] = keys
        self.values[:, :, first:before] = self.sinks.values
        return first

    def _evict(self) -> None:
        if self.policy.window is None or self.seen <= self.policy.window:
            return
        if self.sinks is None:
            count = self.policy.sinks
            self.sinks = Sinks(self.keys[:, :, :count].clone(), self.values[:, :, :count].clone())
            self.start = count
        self.start = max(self.start, self.end - (self.policy.held(self.seen) - self.policy.sinks))

    def _make_room(self, keys: Tensor, values: Tensor, n: int) -> None:
        capacity = self.keys.shape[2] if self.keys.numel() else 0
        if self.end + n <= capacity:
            return
        self._lay_back(keys, values, max(self._needed(n), capacity))

    def _needed(self, n: int) -> int:
        """Slots of a strip for what is held and ``n`` tokens at a time."""
        if self.policy.window is None:
            return -(-(self.end - self.start + n) // BLOCK) * BLOCK
        return self.policy.window + max(n, compaction_interval(self.policy))

    def settle(self) -> None:
        """Give back the room that only many tokens at a time need."""
        if self.end > self.start and self.keys.shape[2] > self._needed(1):
            self._lay_back(self.keys, self.values, self._needed(1))

    def _lay_back(self, keys: Tensor, values: Tensor, capacity: int) -> None:
        """Move the window to the strip's beginning, behind the sinks' slots; the strip gets ``capacity`` slots."""
        kept, first = self.end - self.start, self.policy.sinks if self.sinks is not None else 0
        self.keys = self._laid_back(self.keys, keys, first, capacity)
        self.values = self._laid_back(self.values, values, first, capacity)
        self.offset += self.start - first
        self.start, self.end = first, first + kept

    def _laid_back(self, strip: Tensor, like: Tensor, first: int, capacity: int) -> Tensor:
        dtype = wide(like.dtype) if self.keys_unrotated and strip is self.keys else like.dtype
        window = strip[:, :, self.start : self.end] if strip.numel() else None
        if strip.numel() == 0 or strip.shape[2] != capacity:
            strip = torch.empty(*like.shape[:2], capacity, like.shape[3], dtype=dtype, device=like.device)
        elif window is not None:
            window = window.clone()
        if window is not None:
            strip[:, :, first : first + window.shape[2]] = window
        return strip

    def shift(self, by: int) -> None:
        """Move every position of the window by ``by``."""
        self.offset += by
        if self.rope is not None and not self.keys_unrotated and self.end > self.start:
            window = self.keys[:, :, self.start : self.end]
            self.keys[:, :, self.start : self.end] = self.moves.move(self.rope, window, by)

    @property
    def held(self) -> int:
        """Entries kept for the next step, sinks among them."""
        return self.end - self.start + (self.policy.sinks if self.sinks is not None else 0)

    def entries(self) -> tuple[Tensor, Tensor]:
        """Keys and values kept for the next step, each ``(B, H, held, D)``, in text order."""
        keys, values = (x[:, :, self.start : self.end] for x in (self.keys, self.values))
        if self.sinks is None:
            return keys, values
        return torch.cat((self.sinks.keys.to(keys.dtype), keys), 2), torch.cat((self.sinks.values, values), 2)

    def get_seq_length(self) -> int:
        return self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, 0

    def get_max_length(self) -> int:
        return -1 if self.policy.window is None else self.policy.window

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("a cache that drops entries cannot be rolled back (assisted decoding needs that)")

    def reset(self) -> None:
        self.sinks, self.start, self.end, self.offset, self.seen = None, 0, 0, 0, 0

    def _map(self, pick) -> None:  # noqa: ANN001
        if not self.is_initialized or not self.keys.numel():
            return
        self.keys, self.values = pick(self.keys), pick(self.values)
        if self.sinks is not None:
            self.sinks = Sinks(pick(self.sinks.keys), pick(self.sinks.values))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices.to(x.device)])


def lay(strip: Tensor, states: Tensor) -> None:
    """Copy ``states`` into a part of a strip of the same shape. Those that are promised are written there at once.

    Many tokens on a GPU by words of eight bytes, as torch copies rows that lie apart element by element.
    """
    there = type(states) is Tensor and not states.requires_grad
    many = there and states.is_cuda and states.shape[2] > 1 and strip.dtype == states.dtype
    if many and _in_words(strip) and _in_words(states):
        strip, states = strip.view(torch.int64), states.view(torch.int64)
    strip.copy_(states)


def _in_words(x: Tensor) -> bool:
    """Whether the rows of ``x`` are made of whole words of eight bytes."""
    each = 8 // x.element_size()
    whole = (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(number % each == 0 for number in whole)


def _of_its_own(x: Tensor) -> Tensor:
    """``x``, copied where it is a part of something larger that it would keep in memory."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()
