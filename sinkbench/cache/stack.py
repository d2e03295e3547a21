"""What layers that are alike hold, in tensors of all of them, so that what goes is chosen once for all.

A layer need not know what it evicts before its next step. So the choice waits until the last of them has passed, and
what a device is asked to do for it does not grow with their number.

Between two steps entries lie in the first slots, in no particular order, which differs from head to head. A step's
token lies in the slot behind them, the same in every head, and takes the slot of what goes afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from sinkbench.cache.columns import along
from sinkbench.cache.lowest import lowest
from sinkbench.cache.scoring import scores_of
from sinkbench.positions.rotary import wide
from sinkbench.strategies import Held, LayerPlan

if TYPE_CHECKING:
    from sinkbench.cache.scored import ScoredLayer

BYTES = 2**26  # of keys in a stack of several layers, at most: what a score computes of them takes as much again


@dataclass
class Place:
    """What one layer reads and writes in a step.

    Attributes:
        keys: that the newest token attends to, its own among them, ``(B, H, n, D)``; ``values`` likewise.
        key: the newest, ``(B, H, 1, D)``; ``value`` likewise.
    """

    keys: Tensor
    values: Tensor
    key: Tensor
    value: Tensor


class Stack:
    """Layers with one plan and one rope, in the order in which a forward passes them.

    Shapes: ``R`` rows, the ``B`` streams of the first layer, then those of the next; ``H`` heads of keys and values;
    ``S`` slots, one more than the window has; ``D`` features.

    Attributes:
        keys: as queries meet them, ``(R, H, S, D)``; ``values`` likewise.
        unturned: keys as they would be at position 0, in float32 or wider, where ranks say how far to turn them.
        tokens: index in the text, int64, ``(R, H, S)``.
        ranks: place in text order among those that the head holds, likewise; with ``cache`` positions.
        memory: what the strategy carries for each, ``(R, H, S)``.
        numbers: of the layer of each row, among those that the strategy governs, int64, ``(R, 1, 1)``.
    """

    keys: Tensor
    values: Tensor
    unturned: Tensor | None = None
    tokens: Tensor
    ranks: Tensor | None = None
    memory: dict[str, Tensor]
    numbers: Tensor

    def __init__(self, plan: LayerPlan, layers: "list[ScoredLayer]") -> None:
        self.plan = plan
        # a layer holds its stack; the other way about too, memory would wait for the garbage collector
        self._layers = [ref(layer) for layer in layers]
        self.window, self.eviction = layers[0].window, layers[0].eviction
        for row, layer in enumerate(layers):
            layer.stack, layer.row = self, row
        self.places: list[Place] = []  # of a step with ``present`` entries
        self.present = 0
        self.open = False  # whether a step has begun that not all layers have passed
        self.noted: list[Tensor] = []  # by those that have: weights, or scores

    def take_in(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Make room for layer ``row``, given the first that it holds, each ``(B, H, n, D)``.

        Layers that turn out to lie elsewhere than those before them, or to be too large together, part.
        """
        if row == 0:
            self._allocate(keys, values)
        elif not self._takes(keys, values):
            self._part(row).take_in(0, keys, values)

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        (batch, heads, _, dim), slots, dtype = keys.shape, self.window + 1, wide(keys.dtype)
        ranked = self.plan.positions == "cache"
        turned = ranked and self.layers[0].rope is not None
        size = batch * heads * slots * dim * (dtype if turned else keys.dtype).itemsize
        most = max(1, BYTES // size)
        if self.depth > most:
            Stack(self.plan, self.layers[most:])
            del self._layers[most:]
        rows = batch * self.depth
        self.keys = keys.new_zeros(rows, heads, slots, dim)
        self.values = values.new_zeros(rows, heads, slots, values.shape[-1])
        self.unturned = torch.zeros_like(self.keys, dtype=dtype) if turned else None
        self.tokens = torch.zeros(rows, heads, slots, dtype=torch.long, device=keys.device)
        self.ranks = torch.zeros_like(self.tokens) if ranked else None
        self.memory = {name: torch.zeros_like(self.tokens, dtype=dtype) for name in self.eviction.memory}
        numbers = torch.tensor([layer.number for layer in self.layers], device=keys.device)
        self.numbers = numbers.repeat_interleave(batch)[:, None, None]

    def _takes(self, keys: Tensor, values: Tensor) -> bool:
        return all(
            (x.device, x.dtype, x.shape[:2], x.shape[3]) == (own.device, own.dtype, own.shape[:2], own.shape[3])
            for x, own in ((keys, self.of(0, self.keys)), (values, self.of(0, self.values)))
        )

    def _part(self, row: int) -> "Stack":
        """Leave the layers from ``row`` on, which hold nothing yet, to the stack that is the answer."""
        first = slice(row * self.streams)
        self.map(lambda x: x[first].clone())
        later = Stack(self.plan, self.layers[row:])
        del self._layers[row:]
        if self.open:
            self._end()
        return later

    @property
    def layers(self) -> "list[ScoredLayer]":
        """Whose these are, all of them alive as long as their cache is."""
        return [layer for own in self._layers if (layer := own()) is not None]

    @property
    def depth(self) -> int:
        """How many layers these are."""
        return len(self._layers)

    @property
    def streams(self) -> int:
        """``B``."""
        return len(self.tokens) // self.depth

    def of(self, row: int, x: Tensor) -> Tensor:
        """The part of ``x``, ``(R, ...)``, that is layer ``row``'s."""
        return x.narrow(0, row * self.streams, self.streams)

    def map(self, pick: Callable[[Tensor], Tensor]) -> None:
        """Replace everything by what ``pick`` makes of it."""
        for name in ("keys", "values", "unturned", "tokens", "ranks", "numbers"):
            if getattr(self, name) is not None:
                setattr(self, name, pick(getattr(self, name)))
        self.memory = {name: pick(numbers) for name, numbers in self.memory.items()}
        self.places = []

    def begin(self) -> None:
        """Lay out a step, before its first layer."""
        first = self.layers[0]
        slot = first.held
        self.open, self.noted = True, []
        if not self.places or self.present != slot + 1:
            self._lay_out(slot)
        self.tokens[:, :, slot].fill_(first.seen)
        for numbers in self.memory.values():
            numbers[:, :, slot].zero_()
        if self.ranks is not None:
            self.ranks[:, :, slot].fill_(slot)
        if self.unturned is not None and self.ranks is not None and first.rope is not None:
            query = first.position  # where it stands; every head holds as many entries, and its token is the last
            rope, places = first.rope.at_length(query + 1), self.ranks[:, :, :slot] + (query - slot)
            self.keys[:, :, :slot] = first.moves.move_each(rope, self.unturned[:, :, :slot], places, query)

    def _lay_out(self, slot: int) -> None:
        """Where layers find what they read and write, for tokens that lie in ``slot``."""
        n = self.present = slot + 1
        self.places = []
        for row in range(self.depth):
            keys, values = self.of(row, self.keys)[:, :, :n], self.of(row, self.values)[:, :, :n]
            self.places.append(Place(keys, values, keys[:, :, slot:], values[:, :, slot:]))

    def note(self, row: int, weights: Tensor | None) -> None:
        """Take note of what the query of layer ``row`` looked at; after the last layer, one entry goes.

        Args:
            weights: its shares, ``(B, H, G, n)``; may be ``None`` where no score looks at them.
        """
        if not self.eviction.together:
            assert weights is not None
            layer, mine = self.layers[row], partial(self.of, row)
            scores = scores_of(layer.eviction, self._held(layer, mine, lambda: weights))
            self.noted.append(scores.expand(mine(self.tokens)[:, :, : self.present].shape))
        elif weights is not None:
            self.noted.append(weights)
        if row == self.depth - 1:
            self._end()

    def _scores(self) -> Tensor:
        """Of all entries, ``(R, H, n)`` or ``(R, 1, n)``."""
        if not self.eviction.together:
            return torch.cat(self.noted)
        held = self._held(self.layers[0], lambda x: x, lambda: torch.cat(self.noted), self.numbers)
        return scores_of(self.eviction, held)

    def _held(
        self,
        layer: "ScoredLayer",
        part: Callable[[Tensor], Tensor],
        look: Callable[[], Tensor],
        numbers: Tensor | None = None,
    ) -> Held:
        """What a score sees of a ``part`` of the rows, of which ``layer`` is the first layer."""
        n = self.present
        return Held(
            tokens=part(self.tokens)[:, :, :n],
            now=layer.seen - 1,
            memory={name: part(carried)[:, :, :n] for name, carried in self.memory.items()},
            layer=layer.number,
            look=look,
            keys_of=lambda: part(self.keys)[:, :, :n],
            numbers=numbers,
        )

    def _end(self) -> None:
        """After the last layer of a step: what goes, goes."""
        last, n = self.layers[-1], self.present
        if self.unturned is not None and last.rope is not None:
            rope, new = last.rope.at_length(last.position), self.keys[:, :, n - 1 : n].to(self.unturned.dtype)
            self.unturned[:, :, n - 1 : n] = last.moves.move(rope, new, 1 - last.position)
        scores = self._scores()
        self.open, self.noted = False, []
        if n > self.window:
            policy, now = self.plan.policy, last.seen - 1
            first, end = policy.sinks, last.seen - policy.protected
            self.drop(lowest(scores, self.tokens, first, end, now, self.eviction.tolerance))

    def drop(self, slots: Tensor) -> None:
        """Let go of what lies in ``slots``, ``(R, H, 1)``; the newest entry moves there."""
        if self.layers[0].trace is not None:
            gone = self.tokens.gather(2, slots)
            for row, layer in enumerate(self.layers):
                assert layer.trace is not None
                layer.trace.note(layer.number, layer.seen - 1, gone[row * self.streams, :, 0])
        if self.ranks is not None:
            self.ranks -= (self.ranks > self.ranks.gather(2, slots)).long()
        for x in (self.keys, self.values, self.unturned, self.tokens, self.ranks, *self.memory.values()):
            if x is not None:
                x.scatter_(2, along(slots, x), x[:, :, self.window :].clone())

    def __getstate__(self) -> dict[str, Any]:
        """Without parts of what is there anyway."""
        return vars(self) | {"places": [], "noted": [], "_layers": self.layers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"_layers": [ref(layer) for layer in state["_layers"]]})
