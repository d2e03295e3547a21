"""What a strategy is: a class with validated parameters, and the one or two functions that make it what it is.

By position (:class:`Strategy`): say in :meth:`~Strategy.policy` how many entries a layer holds, and of which the first
tokens are. By a score (:class:`Eviction`): say in :meth:`~Eviction.score` what each entry is worth; the lowest goes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from sinkbench.strategies.plan import Positions
from sinkbench.strategies.policy import Policy
from sinkbench.validation import Whole

if TYPE_CHECKING:
    from torch import Tensor


class Strategy(BaseModel):
    """What a cache keeps.

    The first line of the docstring of a strategy is the sentence by which it is listed; its fields are its parameters,
    given by ``--set name=value``. A field ``sinks`` also takes ``--attention-sink-size``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    positions: ClassVar[Positions] = "text"
    """Where entries stand unless ``--positions`` says otherwise."""

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        """What layer number ``layer`` of the ``layers`` governed ones keeps, for a ``window`` of so many entries.

        Raises:
            UserError: parameters that do not go with the window.
        """
        raise NotImplementedError

    def context(self, window: int) -> int | None:
        """Tokens that are read afresh for every prediction, where no cache is carried; ``None`` where one is."""
        return None


@dataclass
class Held:
    """What a layer holds at one step, the newest token included, as a score sees it.

    Shapes: ``B`` streams, ``H`` heads of keys and values, ``G`` query heads for each of those, ``n`` entries. Entries
    lie in no particular order, which differs from head to head; :attr:`tokens` says which is which.

    Attributes:
        tokens: index in the text of each entry, int64, ``(B, H, n)``.
        now: index in the text of the newest token.
        memory: a number for each entry under each name in :attr:`Eviction.memory`, ``(B, H, n)``, zero when the entry
            comes; to be changed in place.
        layer: number of the layer among those that the strategy governs.
        look: gives :attr:`weights`, which are formed only where a score looks at them.
        keys_of: gives :attr:`keys`, likewise.
        numbers: of layers, where the streams are those of several (:attr:`Eviction.together`).
    """

    tokens: "Tensor"
    now: int
    memory: Mapping[str, "Tensor"]
    layer: int
    look: Callable[[], "Tensor"]
    keys_of: Callable[[], "Tensor"]
    numbers: "Tensor | None" = None

    @cached_property
    def layers(self) -> "Tensor":
        """The number of the layer of each stream, int64, ``(B, 1, 1)``."""
        return self.tokens.new_full((len(self.tokens), 1, 1), self.layer) if self.numbers is None else self.numbers

    @cached_property
    def weights(self) -> "Tensor":
        """The shares that the newest query gave each entry in its softmax, ``(B, H, G, n)``."""
        return self.look()

    @cached_property
    def keys(self) -> "Tensor":
        """Keys as they lie in the cache, ``(B, H, n, D)``; those of half precision in float32."""
        keys = self.keys_of()
        return keys.float() if keys.element_size() == 2 else keys


Pattern = Literal["fixed", "summed", "averaged", "newest", "alike"]
"""How scores follow from what comes, so that a scan need not ask for them at every step:

* ``fixed``: known when an entry comes, from its key, its token and its layer; it never changes.
* ``summed``: the sum of the shares that all queries since then gave the entry, over the queries of a group.
* ``averaged``: that, divided by how many tokens those were.
* ``newest``: the mean of the shares that the newest query gave it, over all heads of the layer.
* ``alike``: minus the cosine of its key with the mean direction of all keys that are held.
"""


class Eviction(Strategy):
    """Evicts, after each step that leaves one entry too many, the entry with the lowest score.

    Attributes:
        sinks: first tokens that never go.
        recent: last tokens, the newest included, that cannot go.
        choice: whether every head of keys and values chooses for itself, or the layer for all of them.
        memory: names of numbers that are carried for each entry from step to step.
        tolerance: scores above the lowest by no more than this share of its magnitude count as equal to it; for scores
            that are equal in exact arithmetic, which rounding would otherwise decide.
        pattern: how scores follow from what comes, where that is simple enough for a scan of its own: the fast scans
            read this, all else asks :meth:`score`, which must come to the same.
        together: whether :meth:`score` may be asked once for several layers, whose streams are then those of one;
            :attr:`Held.layers` has their numbers.
    """

    sinks: Whole = 0
    recent: Whole = 0

    choice: ClassVar[Literal["head", "layer"]] = "head"
    memory: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 0.0
    pattern: ClassVar["Pattern | None"] = None
    together: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """A score of its own follows no pattern, and is asked layer by layer, where it does not say so itself."""
        if "score" in vars(cls) and "pattern" not in vars(cls):
            cls.pattern = None
        if "score" in vars(cls) and "together" not in vars(cls):
            cls.together = False

    def score(self, held: Held) -> "Tensor":
        """The worth of every entry, ``(B, H, n)``, or ``(B, 1, n)`` where the layer chooses.

        Called once a step, after the attention. Of those not protected the lowest goes; of equal ones, the oldest.
        """
        raise NotImplementedError

    def protected(self, window: int) -> int:
        """Last tokens that cannot go, for a ``window`` of so many entries."""
        return self.recent

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window, self.sinks, eviction=self, protected=self.protected(window))


def sentence(kind: type[Strategy]) -> str:
    """The first line of what a strategy says of itself."""
    return (kind.__doc__ or "").strip().split("\n", 1)[0]


def parameters(kind: type[Strategy]) -> dict[str, Any]:
    """The parameters of a strategy with their defaults."""
    return {name: field.get_default(call_default_factory=True) for name, field in kind.model_fields.items()}
