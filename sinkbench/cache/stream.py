"""The cache: how a model is made to keep what a strategy says, through transformers' own cache protocol.

Each layer holds a *strip*: a buffer whose slots stand at consecutive positions. The cache is a view sliding along
it, sinks first, so that an entry's position is its slot and the view is always in text order. Window keys never move
inside the strip; the sinks are laid anew before the window on every step, turned from a pristine copy
to the positions just before it: work in O(sinks), and rounding never accumulates. When the view reaches the strip's
end it is copied back to the beginning, at most once in ``slack`` steps.

Positions are kept small: when the next would pass ``reach``, all keys are turned back (:meth:`StreamCache._rebase`).
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, get_layer_types_and_kwargs

from sinkbench.cache.strip import StripLayer, compaction_interval
from sinkbench.errors import UserError
from sinkbench.positions.detection import read_positions
from sinkbench.positions.rotary import Rope
from sinkbench.strategies import Keep


class StreamCache(Cache):
    """A cache for ``model`` that keeps what ``keep`` says. Pass it as ``past_key_values``.

    The strategy governs the full-attention layers. A sliding-window layer of a model that has others as well keeps
    its own window; in a model with none but sliding layers (Mistral) the strategy governs them all, unless its
    window is the larger one. Linear-attention layers are left as they are.

    Raises:
        UserError: the model's positions cannot stream, or a layer is of an unknown kind.
    """

    def __init__(self, model: PreTrainedModel, keep: Keep) -> None:
        ropes = read_positions(model) if keep.recent is not None else _unread(model)
        self.keep = keep
        self.position = 0  # of the next token
        self.seen = 0  # tokens fed
        super().__init__(layers=_layers(model, keep, ropes))
        self.device = model.device
        # Where frequencies change with the sequence length and the window is longer than they hold, or so nearly
        # that keys would be turned back all the time, every step turns every key anew, from keys kept unturned.
        changing = [layer for layer in self.kept if layer.rope and layer.rope.limit]
        if keep.window is not None and any(
            keep.window + compaction_interval(keep) > layer.rope.limit for layer in changing
        ):
            for layer in changing:
                layer.keys_unrotated = True

    def advance(self, n: int) -> Tensor:
        """The positions at which the next ``n`` tokens are to be fed, shape ``(1, n)``, int64."""
        if self.position + n > self.reach(n):
            self._rebase()
        positions = torch.arange(self.position, self.position + n, device=self.device)[None]
        self.position += n
        self.seen += n
        return positions

    def reach(self, n: int) -> int:
        """Positions stay below this: small enough for float32 angles, and for the model's frequencies to hold."""
        window = self.keep.window
        if window is None:
            return 2**62
        if any(layer.keys_unrotated for layer in self.kept):
            return window + 1  # the last position inside the cache, plus one
        limits = [layer.rope.limit for layer in self.kept if layer.rope and layer.rope.limit]
        return min([max(2 * window, window + 512, window + n), *limits])

    def _rebase(self) -> None:
        assert self.keep.window is not None
        held = min(max(layer.held for layer in self.kept), self.keep.window)
        for layer in self.kept:
            layer.shift(held - self.position)
        self.position = held

    @property
    def kept(self) -> list[StripLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, StripLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for the next step, over all layers."""
        return sum(layer.nbytes for layer in self.kept)

    def nbytes_after(self, first: int, last: int) -> list[int]:
        """Bytes that the strategy holds after ``first``, ``first + 1`` ... ``last`` tokens of the stream."""
        fed = np.arange(first, last + 1)
        groups = Counter((layer.keep.window, layer.bytes_per_token) for layer in self.kept)
        held = [n * size * (fed if window is None else fed.clip(max=window)) for (window, size), n in groups.items()]
        return np.sum(held, axis=0).tolist()


def _unread(model: PreTrainedModel) -> list[Rope | None]:
    """Dense attention never moves a key, so any model will do."""
    return [None] * model.config.get_text_config(decoder=True).num_hidden_layers


def _layers(model: PreTrainedModel, keep: Keep, ropes: list[Rope | None]) -> list[CacheLayerMixin]:
    config = model.config.get_text_config(decoder=True)
    types, kwargs = get_layer_types_and_kwargs(config)
    own_window = kwargs.get("sliding_window")
    none_full = "full_attention" not in types
    native = DynamicCache(config=config).layers
    layers: list[CacheLayerMixin] = []
    for index, kind in enumerate(types):
        if kind == "full_attention":
            layers.append(StripLayer(keep, ropes[index]))
        elif kind == "sliding_attention":
            governed = none_full and keep.window is not None and keep.window < own_window
            layers.append(StripLayer(keep if governed else Keep(0, own_window - 1), ropes[index], is_sliding=True))
        elif not isinstance(native[index], DynamicLayer):
            layers.append(native[index])
        else:
            raise UserError(f"{type(model).__name__} has {kind} layers, which sinkbench does not know how to cut")
    return layers
