"""Text to tokens: datasets of any origin, read as one stream, or as one a row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice

import torch
from torch import Tensor

from sinkbench.config import Source
from sinkbench.data.rows import patiently, rows_from
from sinkbench.errors import UserError
from sinkbench.models import embedded
from sinkbench.signals import check

EMBEDDED = {embedded.TEXT: " ", embedded.CODE: "\n"}  # what joins their rows


@dataclass(frozen=True)
class Stream:
    """Tokens to feed.

    Attributes:
        tokens: int64, shape ``(n,)``.
        exhausted: whether the source had no more than these.
        pretokenised: whether the source held token ids, so that no tokenizer was needed.
        revision: the commit of a Hub dataset, the fingerprint of Python's library; ``None`` for local files.
    """

    tokens: Tensor
    exhausted: bool
    pretokenised: bool
    revision: str | None = None


@dataclass(frozen=True)
class Streams:
    """All that a run reads.

    Attributes:
        tokens: of each stream, int64, shape ``(n,)``, ``n`` at least 2.
        exhausted: whether the source had no more than these, where they are one stream.
        pretokenised: as of a :class:`Stream`; ``revision`` likewise.
        skipped: rows that are too short to predict a token of.
    """

    tokens: Sequence[Tensor]
    exhausted: bool
    pretokenised: bool
    revision: str | None = None
    skipped: int = 0
    predictions: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "predictions", sum(len(tokens) - 1 for tokens in self.tokens))


def read_streams(source: Source, count: int, tokenizer: Callable[[], object]) -> Streams:
    """The first ``count`` tokens of ``source``, or of each of its rows, as it says.

    Raises:
        UserError: as :func:`read_stream`; no row has two tokens.
    """
    if source.documents:
        return read_documents(source, count, tokenizer)
    stream = read_stream(source, count, tokenizer)
    return Streams([stream.tokens], stream.exhausted, stream.pretokenised, stream.revision)


def read_stream(source: Source, count: int | None, tokenizer: Callable[[], object]) -> Stream:
    """The first ``count`` tokens of ``source`` (all of them with ``None``), its rows joined.

    ``tokenizer`` is only called for text; a column that holds lists of integers is used as it is.

    Raises:
        UserError: the dataset, split or column does not exist, or there is no text in it.
    """
    limit = None if source.name in EMBEDDED else source.samples
    with _opened(source, limit) as (cells, pretokenised, revision):
        if pretokenised:
            ids, exhausted = _gather(cells, count, source)
        else:
            ids, exhausted = _tokenise(cells, count, tokenizer(), EMBEDDED.get(source.name, "\n"))
    if len(ids) < 2:
        raise UserError(f"{source.name!r} holds {len(ids)} token(s): at least 2 are needed to predict one from another")
    return Stream(torch.tensor(ids[:count], dtype=torch.long), exhausted, pretokenised, revision)


def read_documents(source: Source, count: int, tokenizer: Callable[[], object]) -> Streams:
    """The first ``count`` tokens of each row of ``source``; rows of fewer than two are left out.

    Raises:
        UserError: as :func:`read_stream`; no row has two tokens.
    """
    found: list[Tensor] = []
    rows = 0
    with _opened(source, source.samples) as (cells, pretokenised, revision):
        spell = None if pretokenised else tokenizer()
        for cell in cells:
            rows += 1
            own = iter([cell])
            if spell is None:
                ids, _ = _gather(own, count, source)
            else:
                ids, _ = _tokenise(own, count, spell, "") if cell else ([], True)
            if len(ids) > 1:
                found.append(torch.tensor(ids[:count], dtype=torch.long))
    if not found:
        raise UserError(
            f"none of the {rows:,} rows of {source.name!r} has 2 tokens: none can be predicted from another"
        )
    return Streams(found, True, pretokenised, revision, rows - len(found))


@contextmanager
def _opened(source: Source, limit: int | None) -> Iterator[tuple[Iterator[object], bool, str | None]]:
    """The cells of the first ``limit`` rows, whether they hold token ids, and what they are of."""
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
        cells = (row[source.column] for row in chain([first], islice(rows, None if limit is None else limit - 1)))
        yield cells, not isinstance(first[source.column], str), revision


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
