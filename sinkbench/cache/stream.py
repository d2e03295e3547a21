"""The cache of a whole model: a layer for each of the model's, as the plan says, through transformers' cache protocol.

Positions are kept small: when the next would pass the reach, all keys are moved back (:meth:`StreamCache._rebase`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from sinkbench.cache.held import bytes_held
from sinkbench.cache.kivi import KiviLayer
from sinkbench.cache.prepared import prepared
from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stack import Stack
from sinkbench.cache.strip import StripLayer
from sinkbench.cache.trace import Trace
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Moves
from sinkbench.strategies import LayerPlan, Plan

KeptLayer = StripLayer | ScoredLayer


class StreamCache(Cache):
    """A cache for ``model`` that keeps what ``plan`` says. Pass it as ``past_key_values``.

    Args:
        trace: takes note of what layers evict by a score.

    Raises:
        UserError: the model's positions cannot stream.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, trace: Trace | None = None) -> None:
        known = prepared(model, plan)
        self.plan, self.reach, self.needs_attention = plan, known.reach, known.needs_attention
        self.copies, self.device, self.itemsize = known.copies, known.device, known.itemsize
        self.position = 0  # of the next token
        self.seen = 0  # tokens fed
        super().__init__(layers=_layers(model, plan, known.ropes))
        # Where frequencies change inside the window, every step turns every key anew, from keys kept unrotated.
        moves = Moves()
        for layer in self.kept:
            if isinstance(layer, ScoredLayer):
                layer.trace = trace
            layer.moves = moves
            if isinstance(layer, StripLayer) and layer.rope and layer.rope.limit and self.reach.anew:
                layer.keys_unrotated = True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As ``Cache.update``. Of keys and values that the model has copied, one is kept, and copies are answered.

        Under autocast both are kept in its type, to which attentions bring them: a model may hand on keys in another
        type than values, and gets its own types back.
        """
        types, device = (key_states.dtype, value_states.dtype), key_states.device.type
        if torch.is_autocast_enabled(device) and key_states.is_floating_point():
            lower = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(lower), value_states.to(lower)
            self.itemsize = lower.itemsize
        layer, update = self.plan.layers[layer_idx], self.layers[layer_idx].update
        if self.copies == 1 or layer is None or key_states.shape[1] == layer.sizes.kv_heads:
            keys, values = update(key_states, value_states, *args, **kwargs)
        else:
            one = key_states[:, :: self.copies], value_states[:, :: self.copies]
            keys, values = (x.repeat_interleave(self.copies, dim=1) for x in update(*one, *args, **kwargs))
        if (keys.dtype, values.dtype) == types:  # as a rule: to ask for what is there takes longer
            return keys, values
        return keys.to(types[0]), values.to(types[1])

    def advance(self, n: int) -> Tensor:
        """The positions at which the next ``n`` tokens are to be fed, shape ``(1, n)``, int64."""
        if self.position + n > self.reach.end(n):
            self._rebase()
        positions = torch.arange(self.position, self.position + n, device=self.device)[None]
        self.position += n
        self.seen += n
        return positions

    def reread(self, model: PreTrainedModel) -> None:
        """Take positions from ``model`` again: those that were pickled do not know it."""
        for layer, rope in zip(self.layers, prepared(model, self.plan).ropes, strict=True):
            if isinstance(layer, StripLayer | ScoredLayer):
                layer.rope = rope

    def _rebase(self) -> None:
        held = min(max(layer.held for layer in self.kept), self.reach.window or self.position)
        for layer in self.kept:
            layer.shift(held - self.position)
        self.position = held

    @property
    def kept(self) -> list[KeptLayer]:
        """The layers that hold keys and values."""
        return [layer for layer in self.layers if isinstance(layer, StripLayer | ScoredLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for the next step, of one stream over all layers."""
        return int(bytes_held(self.plan, self.itemsize, self.seen))


def _layers(model: PreTrainedModel, plan: Plan, ropes: Sequence[Rope | None]) -> list[CacheLayerMixin]:
    left = any(layer is None for layer in plan.layers)
    native = DynamicCache(config=model.config.get_text_config(decoder=True)).layers if left else []
    layers: list[CacheLayerMixin] = []
    alike: dict[tuple[LayerPlan, int], list[ScoredLayer]] = {}
    governed = 0
    for index, (layer, rope) in enumerate(zip(plan.layers, ropes, strict=True)):
        if layer is None:
            layers.append(native[index])
        elif layer.format.recoded:
            layers.append(KiviLayer(layer, rope))
        elif layer.policy.by_score:
            layers.append(ScoredLayer(layer, rope, governed))
            alike.setdefault((layer, id(rope)), []).append(layers[-1])
        else:
            layers.append(StripLayer(layer, rope))
        governed += layer is not None and not layer.own
    for (plan_of_all, _), together in alike.items():
        Stack(plan_of_all, together)
    return layers
