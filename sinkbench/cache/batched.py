"""Batches of streams: one cache a group of rows that have seen the same number of tokens.

Padding never reaches a cache: a row's padding is left out and its tokens are fed alone, so that each row gets what it
gets alone. Rows of equal length share their forwards; rows of other lengths have forwards of their own.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import StripLayer
from sinkbench.errors import UserError
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.bare import device_of
from sinkbench.strategies import Plan


@dataclass
class Group:
    """Rows that share a cache: their indices in the batch, and the cache, whose row ``i`` is ``rows[i]``."""

    rows: list[int]
    cache: StreamCache


class BatchedCache(Cache):
    """The caches of a batch of streams through ``model``, as one object that transformers' ``generate`` can carry.

    Copies share the model and nothing else. Pickled, it goes without the model, and works with the first that it is
    passed to (:meth:`attach`).

    Attributes:
        name: of the strategy.
        columns: text that passed, padding included: what ``generate`` must leave out of the next ``input_ids``.
        groups: which rows share which cache; none before the first token.
    """

    model: PreTrainedModel | None

    def __init__(self, model: PreTrainedModel, plan: Plan, name: str = "a strategy") -> None:
        super().__init__(layers=[])
        self.model, self.plan, self.name = model, plan, name
        self.columns = 0
        self.groups = [Group([], StreamCache(model, plan))]  # refuses what cannot stream now and not later

    def __len__(self) -> int:
        """The number of layers, as of every cache of transformers; so an empty one is not false."""
        return len(self.groups[0].cache.layers)

    def __repr__(self) -> str:
        held = f"{self.held:,} tokens held of {self.seen:,}, {self.nbytes:,} bytes"
        rows = f", {self.rows} rows" if self.rows > 1 else ""
        return f"{type(self).__name__}({self.name}, {held}{rows})"

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values held in a layer, each ``(B, H, held, D)``: by position, in text order.

        Raises:
            IndexError: the model has no such layer.
            UserError: rows hold different numbers of tokens, or the layer no keys.
        """
        if len(self.groups) > 1:
            raise UserError("rows of different lengths are held apart: look at cache.groups[i].cache.layers[layer]")
        found = self.groups[0].cache.layers[layer]
        if not isinstance(found, StripLayer | ScoredLayer):
            raise UserError(f"layer {layer} carries a state, and no keys and values")
        if not found.is_initialized:
            raise UserError("this cache has seen nothing yet")
        return found.entries()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = object.__new__(type(self))
        policies = [layer.policy for layer in self.plan.kept]
        memo |= {id(x): x for x in (self.plan, *self.plan.kept, *policies)}  # never change
        shared = {"model": self.model, "plan": self.plan}
        vars(twin).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in shared} | shared)
        return twin

    def __copy__(self) -> Self:
        """As a deep copy: what one reads, the other must not see."""
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"model": None}

    def attach(self, model: PreTrainedModel) -> None:
        """Let an unpickled cache work with ``model``, which must be like the one that it was made for.

        Raises:
            UserError: it has a model, or this one has other layers, or lies elsewhere.
        """
        if self.model is not None and self.model is not model:
            raise UserError("this cache was made for another model: make one with sinkbench.SinkCache(model)")
        wanted = [layer.sizes for layer in self.plan.kept]
        if wanted != [sizes for sizes in layer_sizes(model.config) if sizes.kind != "state"]:
            raise UserError(f"this cache was made for a model of other layers than this {type(model).__name__}")
        if any(group.cache.device != device_of(model) for group in self.groups):
            raise UserError(f"this cache lies on {self.groups[0].cache.device}, and the model on {device_of(model)}")
        self.model = model
        for group in self.groups:
            group.cache.reread(model)

    @property
    def rows(self) -> int:
        """The size of the batch; 0 before the first token."""
        return sum(len(group.rows) for group in self.groups)

    @property
    def seen(self) -> int:
        """Tokens fed to the longest row, padding not counted."""
        return max(group.cache.seen for group in self.groups)

    @property
    def held(self) -> int:
        """Entries held for the next step in each full-attention layer of the longest row, sinks included."""
        return max(held_by(group.cache) for group in self.groups)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values held for the next step, over all rows and layers."""
        return sum(group.cache.nbytes * max(1, len(group.rows)) for group in self.groups)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The text that passed, padding included. It is not the number of entries held: see :attr:`held`."""
        return self.columns

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a forward that calls this does not know the strategy."""
        raise UserError(
            "this cache works with the model it was made for, while that model carries the strategy: call the model "
            "itself and not a part of it, within `with attention_sinks(model)` if it came from there, and after "
            "cache.attach(model) if it was unpickled"
        )

    def reset(self) -> None:
        """Forget the text, as if newly made."""
        if self.model is None:
            raise UserError("an unpickled cache has no model yet: cache.attach(model)")
        self.columns, self.groups = 0, [Group([], StreamCache(self.model, self.plan))]

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("a cache that drops entries cannot be rolled back (assisted decoding needs that)")

    def _take(self, sources: list[int]) -> None:
        """Row ``i`` becomes what row ``sources[i]`` was."""
        groups = []
        for group in self.groups:
            rows = [i for i, source in enumerate(sources) if source in group.rows]
            if rows:
                index = torch.tensor([group.rows.index(sources[i]) for i in rows], device=group.cache.device)
                group.cache.reorder_cache(index)
                groups.append(Group(rows, group.cache))
        self.groups = groups or self.groups

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(torch.arange(self.rows)[indices.cpu()].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([row for row in range(self.rows) for _ in range(repeats)])

    def take_in(self, counts: list[int]) -> list[tuple[Group, int]]:
        """Groups whose rows get the same number of new tokens, with that number; ``counts`` has one for each row.

        Raises:
            UserError: the batch is of another size than before.
        """
        if not self.rows:
            self.groups[0].rows = list(range(len(counts)))
        elif self.rows != len(counts):
            raise UserError(f"a cache of {self.rows} rows was given a batch of {len(counts)}")
        if len(self.groups) == 1 and len(set(counts)) == 1:
            return [(self.groups[0], counts[0])]
        parts = []
        for group in self.groups:
            sizes = sorted({counts[row] for row in group.rows})
            for size in sizes:
                rows = [row for row in group.rows if counts[row] == size]
                parts.append((Group(rows, group.cache if len(sizes) == 1 else _part(group, rows)), size))
        self.groups = [group for group, _ in parts]
        return parts


def _part(group: Group, rows: list[int]) -> StreamCache:
    cache = copy.deepcopy(group.cache)
    cache.reorder_cache(torch.tensor([group.rows.index(row) for row in rows], device=cache.device))
    return cache


def held_by(cache: StreamCache) -> int:
    """Entries that the fullest layer of ``cache`` holds."""
    return max(layer.held for layer in cache.kept)
