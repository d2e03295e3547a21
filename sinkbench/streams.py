"""Text to tokens: datasets of any origin, read as one stream."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sinkbench import embedded
from sinkbench.errors import UserError

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Source:
    """Where the stream comes from.

    Attributes:
        name: a Hub id, a local file or folder, or ``kjv``.
        column: holds the text, or lists of token ids.
        task: the configuration of a Hub dataset.
        split: which split; a local file has one, which answers to any name.
        samples: rows to read as one stream.
        revision: branch, tag or commit of a Hub dataset.
    """

    name: str
    column: str = "text"
    task: str | None = None
    split: str = "test"
    samples: int = 1
    revision: str | None = None


@dataclass(frozen=True)
class Stream:
    """Tokens to feed, int64, shape ``(n,)``, and whether the source had no more than these."""

    tokens: Tensor
    exhausted: bool
    pretokenised: bool


def read_stream(source: Source, count: int | None, tokenizer: Callable[[], object]) -> Stream:
    """The first ``count`` tokens of ``source`` (all of them with ``None``).

    ``tokenizer`` is only called for text; a column that holds lists of integers is used as it is.

    Raises:
        UserError: the dataset, split or column does not exist, or there is no text in it.
    """
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise UserError(f"the dataset {source.name!r} has no rows in split {source.split!r}")
    if source.column not in first:
        raise UserError(f"no column {source.column!r} in {source.name!r}: there are {', '.join(sorted(first))}")
    cells = _cells(first, rows, source)
    if isinstance(first[source.column], str):
        ids, exhausted = _tokenise(cells, count, tokenizer(), " " if source.name == embedded.TEXT else "\n")
        return _stream(source, ids, count, exhausted, pretokenised=False)
    ids, exhausted = _gather(cells, count, source)
    return _stream(source, ids, count, exhausted, pretokenised=True)


def _stream(source: Source, ids: list[int], count: int | None, exhausted: bool, pretokenised: bool) -> Stream:
    if len(ids) < 2:
        raise UserError(f"{source.name!r} holds {len(ids)} token(s): at least 2 are needed to predict one from another")
    return Stream(torch.tensor(ids[:count], dtype=torch.long), exhausted, pretokenised)


def _cells(first: dict, rows: Iterator[dict], source: Source) -> Iterator[object]:
    yield first[source.column]
    limit = None if source.name == embedded.TEXT else source.samples - 1
    for row in islice(rows, limit):
        yield row[source.column]


def _gather(cells: Iterator, count: int | None, source: Source) -> tuple[list[int], bool]:
    """Token ids of a pre-tokenised column, and whether the rows ended."""
    ids: list[int] = []
    for cell in cells:
        if not isinstance(cell, list) or not all(isinstance(i, int) for i in cell):
            kind = type(cell).__name__
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
        ended = ended and len(cut) == len(text)
        goal *= 2
    return ids, ended and (count is None or len(ids) <= count)


def _rows(source: Source) -> Iterator[dict]:
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import datasets

    datasets.disable_progress_bars()
    if source.name == embedded.TEXT:
        return iter(_load(source, "json", data_files=str(embedded.text_file()), split="train"))
    path = Path(source.name).expanduser()
    if path.is_file():
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise UserError(f"cannot read {path}: a dataset file ends in {', '.join(sorted(BUILDERS))}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        options = {"sample_by": "document"} if builder == "text" else {}
        return iter(_load(source, builder, data_files=str(path), split="train", **options))
    if path.is_dir():
        return iter(_load_folder(source, path))
    if path.is_absolute() or source.name.startswith((".", "~")) or path.suffix.lower() in BUILDERS:
        raise UserError(f"no file or folder {source.name!r} to read a dataset from")
    return iter(_load(source, source.name, source.task, split=source.split, revision=source.revision))


def _load_folder(source: Source, path: Path):  # noqa: ANN202
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if source.split not in loaded:
                raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(sorted(loaded))}")
            return loaded[source.split]
        return loaded
    from datasets import get_dataset_split_names

    try:
        splits = get_dataset_split_names(str(path), source.task)
    except Exception as error:
        raise UserError(f"cannot read a dataset from the folder {path}: {_short(error)}") from error
    only = splits[0] if len(splits) == 1 else source.split
    if only not in splits:
        raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(splits)}")
    return _load(source, str(path), source.task, split=only)


def _load(source: Source, *args: object, **kwargs: object) -> Iterator[dict]:
    """Rows as they stream in, every failure told in one line."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, split = source.name, source.split
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not for users
    try:
        dataset = load_dataset(*args, streaming=True, **kwargs)
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise UserError(
                f"the dataset {name!r} is gated: ask for access on its Hub page, then `hf auth login`"
            ) from error
        raise UserError(
            f"no dataset {name!r}: neither a local file or folder, nor found on the Hub ({_short(error)})"
        ) from error
    except ValueError as error:
        if "split" in str(error).lower():
            try:
                there = ", ".join(get_dataset_split_names(str(args[0]), source.task))
            except Exception:
                there = _short(error)
            raise UserError(f"no split {split!r} in {name!r}: there are {there}") from error
        raise UserError(f"cannot load the dataset {name!r}: {_short(error)}") from error
    except Exception as error:
        raise UserError(f"cannot load the dataset {name!r}: {_short(error)}") from error
    return _told(iter(dataset), name)


def _told(rows: Iterator[dict], name: str) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:
        raise UserError(f"cannot read the dataset {name!r}: {_short(error)}") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
