"""Text to tokens: datasets of any origin, read as one stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from sinkbench.config import Source
from sinkbench.data.rows import patiently, rows_from
from sinkbench.errors import UserError
from sinkbench.models import embedded
from sinkbench.signals import check


@dataclass(frozen=True)
class Stream:
    """Tokens to feed.

    Attributes:
        tokens: int64, shape ``(n,)``.
        exhausted: whether the source had no more than these.
        pretokenised: whether the source held token ids, so that no tokenizer was needed.
        revision: the commit of a Hub dataset; ``None`` for local ones.
    """

    tokens: Tensor
    exhausted: bool
    pretokenised: bool
    revision: str | None = None


def read_stream(source: Source, count: int | None, tokenizer: Callable[[], object]) -> Stream:
    """The first ``count`` tokens of ``source`` (all of them with ``None``).

    ``tokenizer`` is only called for text; a column that holds lists of integers is used as it is.

    Raises:
        UserError: the dataset, split or column does not exist, or there is no text in it.
    """
    with patiently():
        try:
            rows, revision = rows_from(source)
        except (OSError, ValueError) as error:  # a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read the dataset {source.name!r}: {reason}") from error
        first = next(rows, None)
        if first is None:
            raise UserError(f"the dataset {source.name!r} has no rows in split {source.split!r}")
        if source.column not in first:
            raise UserError(f"no column {source.column!r} in {source.name!r}: there are {', '.join(sorted(first))}")
        cells = _cells(first, rows, source)
        pretokenised = not isinstance(first[source.column], str)
        if pretokenised:
            ids, exhausted = _gather(cells, count, source)
        else:
            joint = " " if source.name == embedded.TEXT else "\n"
            ids, exhausted = _tokenise(cells, count, tokenizer(), joint)
    if len(ids) < 2:
        raise UserError(f"{source.name!r} holds {len(ids)} token(s): at least 2 are needed to predict one from another")
    return Stream(torch.tensor(ids[:count], dtype=torch.long), exhausted, pretokenised, revision)


def _cells(first: dict, rows: Iterator[dict], source: Source) -> Iterator[object]:
    yield first[source.column]
    limit = None if source.name == embedded.TEXT else source.samples - 1
    for row in islice(rows, limit):
        yield row[source.column]


def _gather(cells: Iterator, count: int | None, source: Source) -> tuple[list[int], bool]:
    """Token ids of a pre-tokenised column, and whether the rows ended."""
    ids: list[int] = []
    for cell in cells:
        if not isinstance(cell, list) or not all(type(i) is int and abs(i) < 2**63 for i in cell):  # bool is an int too
            kind = type(cell).__name__
            if isinstance(cell, list):
                kind = f"a list with {next(i for i in cell if type(i) is not int or abs(i) >= 2**63)!r}"
            raise UserError(
                f"column {source.column!r} of {source.name!r} holds {kind}: text or lists of integers are needed"
            )
        ids += cell
        if count is not None and len(ids) >= count:
            return ids, len(ids) == count and next(cells, None) is None
    return ids, True


def _tokenise(cells: Iterator, count: int | None, tokenizer, joint: str) -> tuple[list[int], bool]:  # noqa: ANN001
    """Token ids of text cells joined by ``joint``, reading no further than needed.

    What is read is always longer than what is used, so that the last tokens do not depend on where reading stopped.
    """
    text, ended = "", False
    goal = float("inf") if count is None else 8 * count + 1000
    ids: list[int] = []
    started = False
    while not ended and (count is None or len(ids) <= count + 16):
        parts: list[str] = []
        size = len(text)
        while size < goal:
            cell = next(cells, None)
            if cell is None:
                ended = True
                break
            parts.append(str(cell))
            size += len(parts[-1]) + len(joint)
        text = joint.join(([text] if started else []) + parts)
        started = True
        cut = text if ended and len(text) <= goal else text[: int(min(goal, len(text)))]
        ids = tokenizer(cut, verbose=False)["input_ids"]
        check()
        ended = ended and len(cut) == len(text)
        goal *= 2
    return ids, ended and (count is None or len(ids) <= count)
