"""Independent streams side by side: which share a batch, and how far each forward of a batch goes.

The streams of a batch stand at the same position, so they share a cache, and one that ends leaves it. Streams of
similar lengths share a batch, so that few leave early. What is here is arithmetic: the same streams and the same room
give the same batches, and so the same rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

SHELF = 4  # batches whose streams are sorted by length; rows are written in the order of streams, so not all are
SPARE = 8  # at most one in so many tokens of a forward stands where a stream has ended


@dataclass(frozen=True)
class Piece:
    """One forward of a batch: the tokens ``begin .. end`` of its first ``rows`` streams, the longest ones."""

    begin: int
    end: int
    rows: int


def batches(lengths: Sequence[int], fits: Callable[[int], int]) -> Iterator[list[int]]:
    """Indices of streams that are read together, the longest first; consecutive ones as far as lengths allow.

    Args:
        lengths: tokens to feed of each; streams of none are in no batch.
        fits: how many streams of at most so many tokens there is room for.
    """
    shelf: list[int] = []
    for index, length in enumerate(lengths):
        if length:
            shelf.append(index)
        if shelf and len(shelf) >= SHELF * fits(max(lengths[i] for i in shelf)):
            yield from _batches_of(shelf, lengths, fits)
            shelf = []
    yield from _batches_of(shelf, lengths, fits)


def _batches_of(shelf: Sequence[int], lengths: Sequence[int], fits: Callable[[int], int]) -> Iterator[list[int]]:
    left = sorted(shelf, key=lambda i: -lengths[i])
    while left:
        batches_left = -(-len(left) // fits(lengths[left[0]]))
        count = -(-len(left) // batches_left)
        yield left[:count]
        left = left[count:]


def pieces(lengths: Sequence[int], chunk: int) -> Iterator[Piece]:
    """The forwards of a batch of streams of these ``lengths``, the longest first, ``chunk`` tokens each at most.

    A forward ends where streams end, unless they are so close together that a few tokens beyond them cost less.
    """
    begin, rows = 0, len(lengths)
    while rows and begin < lengths[0]:
        left = [length - begin for length in lengths[:rows]]
        ends = {min(chunk, n) for n in left}
        end = max(n for n in ends if SPARE * sum(max(0, n - mine) for mine in left) <= n * rows)
        yield Piece(begin, begin + end, rows)
        begin += end
        rows = sum(length > begin for length in lengths[:rows])
