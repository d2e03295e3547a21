"""Hidden states of streams, piece by piece: what many tokens a forward come to under one plan, and under two."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

Place = TypeVar("Place")


@dataclass(frozen=True)
class States(Generic[Place]):
    """Hidden states, to be read piece by piece; between two pieces others may read theirs with the same model.

    To be read with exact angles (:mod:`sinkbench.positions.exact`).

    Attributes:
        longest: positions for which tables of the model have to last (:func:`sinkbench.positions.families.lasting`).
        read: where each piece is, and its states.
        at_once: pieces that a device works on at once, where they are asked for before they are done.
    """

    longest: int
    read: Iterator[tuple[Place, Tensor]]
    at_once: int = 1


def behind(start: int, read: Iterator[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Pieces of one stream, where each begins with its states ``(n, width)``, without the first ``start`` tokens."""
    for begin, hidden in read:
        if begin + len(hidden) > start:
            yield max(begin, start), hidden[max(0, start - begin) :]


def together(
    one: Iterator[tuple[int, Tensor]], other: Iterator[tuple[int, Tensor]], until: int
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Where each piece begins, and the states of both, cut where a piece of either ends; both begin at one token.

    From token ``until`` on, those of the first alone.
    """
    theirs, done = None, 0  # of the piece of the other, so many states are paired
    for begin, ours in one:
        paired = 0
        while paired < len(ours):
            if begin + paired >= until:
                yield begin + paired, ours[paired:], None
                break
            if theirs is None or done == len(theirs):
                (_, theirs), done = next(other), 0
            n = min(len(ours) - paired, len(theirs) - done, until - begin - paired)
            yield begin + paired, ours[paired : paired + n], theirs[done : done + n]
            paired, done = paired + n, done + n
