"""The plan: what every layer of a model keeps, in which format, and where its entries stand.

It is made once, from a strategy and the sizes of a model, and read by the cache, every engine, the estimate and the
record.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from sinkbench.strategies.formats import Format
from sinkbench.strategies.policy import Policy

Positions = Literal["cache", "text"]


@dataclass(frozen=True)
class LayerSizes:
    """What a plan has to know of one layer.

    Attributes:
        kind: ``full`` attention; ``sliding``, with a window of the model's own; ``state``, which keeps no keys.
        kv_heads: heads of keys and values.
        head_dim: features of a key, and of a value.
        window: of a sliding layer: the tokens that a query sees, itself included.
    """

    kind: Literal["full", "sliding", "state"]
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Attributes:
        policy: how many entries, and which go.
        positions: ``cache``: an entry stands at its rank among those held; ``text``: where it stands in the text.
        format: in which keys and values are stored.
        sizes: of the layer.
        own: whether this is the model's own sliding window, which no strategy governs.
    """

    policy: Policy
    positions: Positions
    format: Format
    sizes: LayerSizes
    own: bool = False

    @property
    def gap(self) -> bool:
        """Whether entries may lie apart: where they stand in the text, with gaps where others are gone."""
        return self.positions == "text" and self.policy.window is not None and (self.policy.sinks > 0 or self.by_score)

    @property
    def by_score(self) -> bool:
        """Whether what goes depends on more than positions."""
        return self.policy.by_score


@dataclass(frozen=True)
class Plan:
    """What all layers keep.

    Attributes:
        layers: one plan a layer; ``None`` for a layer that carries a state of its own and is left as it is.
        context: where no cache is carried: each token is predicted from a forward over the last ``context`` tokens.
    """

    layers: tuple[LayerPlan | None, ...]
    context: int | None = None
    positions: Positions = field(init=False)

    def __post_init__(self) -> None:
        kept = [layer.positions for layer in self.governed] or ["text"]
        object.__setattr__(self, "positions", kept[0])

    @cached_property
    def kept(self) -> list[LayerPlan]:
        """The plans of layers that hold keys and values."""
        return [layer for layer in self.layers if layer is not None]

    @cached_property
    def governed(self) -> list[LayerPlan]:
        """The plans of layers that the strategy governs."""
        return [layer for layer in self.kept if not layer.own]

    @cached_property
    def stateful(self) -> bool:
        """Whether some layers carry a state from token to token."""
        return None in self.layers

    @cached_property
    def dense(self) -> bool:
        """Whether nothing is ever dropped in the layers that the strategy governs."""
        return self.context is None and self.window is None

    @cached_property
    def window(self) -> int | None:
        """The most entries that a governed layer holds between two steps; ``None`` without a bound."""
        windows = [layer.policy.window for layer in self.governed]
        bounded = [window for window in windows if window is not None]
        return max(bounded) if bounded and len(bounded) == len(windows) else None

    @cached_property
    def longest(self) -> int | None:
        """As :attr:`window`; of a model with none but windows of its own, the longest of those."""
        own = [layer.policy.window for layer in self.kept if layer.policy.window is not None]
        return self.window if self.governed else max(own, default=None)

    @cached_property
    def narrowest(self) -> int | None:
        """The fewest entries to which a layer is cut; ``None`` where none is."""
        return min((layer.policy.window for layer in self.kept if layer.policy.window is not None), default=None)

    @cached_property
    def by_score(self) -> bool:
        """Whether a layer chooses what goes by a score."""
        return any(layer.policy.by_score for layer in self.kept)

    @cached_property
    def as_computed(self) -> bool:
        """Whether all layers store keys and values as the model computes them."""
        return all(layer.format == Format() for layer in self.kept)

    @cached_property
    def recoded(self) -> bool:
        """Whether a layer stores entries anew after the steps that first read them."""
        return any(layer.format.recoded for layer in self.kept)


def make_plan(
    sizes: Sequence[LayerSizes],
    policies: Callable[[int, int], Policy],
    positions: Positions,
    stored: Format,
    context: int | None = None,
) -> Plan:
    """The plan for a model of these ``sizes``.

    The strategy governs the full-attention layers. A sliding-window layer of a model that has others as well keeps
    its own window; in a model with none but sliding layers (Mistral) the strategy governs them all, unless its window
    is the larger one.

    Args:
        sizes: of each layer.
        policies: the policy of the governed layer of this index, out of so many.
        context: as in :class:`Plan`.
    """
    has_full = any(layer.kind == "full" for layer in sizes)
    candidates = [i for i, layer in enumerate(sizes) if layer.kind == ("full" if has_full else "sliding")]
    layers: list[LayerPlan | None] = []
    for index, layer in enumerate(sizes):
        if layer.kind == "state":
            layers.append(None)
            continue
        own = Policy(None if layer.window is None else layer.window - 1)
        chosen = own
        if index in candidates:
            chosen = policies(candidates.index(index), len(candidates))
        governed = layer.kind == "full" or (index in candidates and _narrower(chosen, own))
        layers.append(LayerPlan(chosen if governed else own, positions, stored, layer, own=not governed))
    return Plan(tuple(layers), context)


def _narrower(policy: Policy, own: Policy) -> bool:
    return policy.window is not None and own.window is not None and policy.window <= own.window
