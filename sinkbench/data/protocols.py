"""Protocols (``--protocol``): how a text is cut into windows of dense attention, and which predictions count.

Each is what a number in the literature was made by (docs/measures.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from sinkbench.errors import UserError


@dataclass(frozen=True)
class Window:
    """One forward over consecutive tokens.

    Attributes:
        begin: index in the text of the first token that is fed; -1 where that is no token of it.
        end: index behind the last one.
        scored: index of the first token whose prediction counts; it, and all behind it up to ``end``, which is not fed.
        lead: whether the first token that is fed is another one, which says that a text begins.
    """

    begin: int
    end: int
    scored: int
    lead: bool = False

    @property
    def fed(self) -> int:
        """How many tokens are fed."""
        return self.end - self.begin

    @property
    def predictions(self) -> int:
        """How many predictions count."""
        return self.end + 1 - self.scored


def windows_of(protocol: str, n: int, length: int, stride: int | None = None) -> list[Window]:
    """The windows of a text of ``n`` tokens, in its order; each prediction is of one token, and none of two windows.

    Args:
        length: tokens of a window (``--context-length``).
        stride: from one window to the next, of ``strided``.

    Raises:
        UserError: the text is shorter than a window.
    """
    found = list(_CUTS[protocol](n, length, stride or length))
    if not found:
        raise UserError(
            f"the text has {n:,} tokens, and a window of --protocol {protocol} has {length:,}: "
            "give more --num-tokens, or a shorter --context-length"
        )
    return found


def scored_by(windows: Sequence[Window], predictions: int) -> list[tuple[int, int]]:
    """Where the first ``predictions`` tokens that ``windows`` predict lie: from an index to that behind the last."""
    found: list[tuple[int, int]] = []
    for window in windows:
        end = min(window.end + 1, window.scored + predictions)
        if end <= window.scored:
            break
        predictions -= end - window.scored
        together = found and found[-1][1] == window.scored
        found.append((found.pop()[0] if together else window.scored, end))
    return found


def _windows(n: int, length: int, stride: int) -> Iterator[Window]:
    """Disjoint ones; all but the first token of each count; what is left of the text is not read (GPTQ)."""
    for begin in range(0, n - length + 1, length):
        yield Window(begin, begin + length - 1, begin + 1)


def _strided(n: int, length: int, stride: int) -> Iterator[Window]:
    """One every ``stride`` tokens, the last as long as the text is; what counts has not before."""
    counted = 1
    for begin in range(0, n, stride):
        end = min(begin + length, n) - 1
        if end >= max(counted, begin + 1):
            yield Window(begin, end, max(counted, begin + 1))
        counted = end + 1
        if counted == n:
            return


def _llamacpp(n: int, length: int, stride: int) -> Iterator[Window]:
    """Disjoint ones, whose first token is replaced; predictions from the middle on count; what is left is not read."""
    for begin in range(0, n - length + 1, length):
        yield Window(begin, begin + length - 1, begin + length // 2 + 1, lead=True)


def _rolling(n: int, length: int, stride: int) -> Iterator[Window]:
    """``length`` predictions each, from one token before them; the last reaches back as far as others do."""
    yield Window(-1, min(length, n) - 1, 0, lead=True)
    for scored in range(length, n, length):
        end = min(scored + length, n) - 1
        yield Window(end - length, end, scored)


_CUTS: dict[str, Callable[[int, int, int], Iterator[Window]]] = {
    "windows": _windows,
    "strided": _strided,
    "llamacpp": _llamacpp,
    "rolling": _rolling,
}
