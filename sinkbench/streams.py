"""Text to tokens: datasets of any origin, read as one stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sinkbench import embedded, hub
from sinkbench.errors import UserError
from sinkbench.quiet import quiet

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
        streaming: read rows as they are needed; otherwise the split is downloaded whole, and kept for later runs.
    """

    name: str
    column: str = "text"
    task: str | None = None
    split: str = "test"
    samples: int = 1
    revision: str | None = None
    streaming: bool = True


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
    with _patient():
        rows, revision = _rows(source)
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


def _rows(source: Source) -> tuple[Iterator[dict], str | None]:
    """The rows, and the commit they come from where that is one of the Hub."""
    if source.name == embedded.TEXT:
        return _load(source, "json", data_files=str(embedded.text_file()), split="train"), None
    path = Path(source.name).expanduser()
    if path.is_file():
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise UserError(f"cannot read {path}: a dataset file ends in {', '.join(sorted(BUILDERS))}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        options = {"sample_by": "document"} if builder == "text" else {}
        return _load(source, builder, data_files=str(path), split="train", **options), None
    if path.is_dir():
        return _load_folder(source, path), None
    if path.is_absolute() or source.name.startswith((".", "~")) or path.suffix.lower() in BUILDERS:
        raise UserError(f"no file or folder {source.name!r} to read a dataset from")
    return _load_from_hub(source)


def _load_from_hub(source: Source) -> tuple[Iterator[dict], str]:
    pinned = hub.pin("dataset", source.name, source.revision)
    if f"{source.name.split('/')[-1]}.py" in pinned.files:
        raise UserError(
            f"the dataset {source.name!r} brings a loading script, and no script of a dataset is run: "
            "give --dataset-revision refs/convert/parquet where its Hub page offers one, or another dataset"
        )
    if pinned.reachable:
        rows = _load(source, source.name, source.task, split=source.split, revision=pinned.commit)
    elif source.streaming:
        raise UserError(
            f"the Hub is out of reach and the dataset {source.name!r} is read from it as a stream: "
            "give --no-streaming, which keeps what it downloads, or a local file"
        )
    else:
        rows = _load_kept(source, pinned.commit)
    return rows, pinned.commit


def _load_kept(source: Source, commit: str) -> Iterator[dict]:
    """Rows that an earlier run downloaded: of this commit, where `datasets` itself would take the latest it has."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, short = source.name.split("/")
    kept = Path(config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(short)])
    folders = sorted(kept.glob(f"{source.task or '*'}/*/{commit}"))
    if len(folders) != 1:
        problem = "is not in the cache" if not folders else "is there with several configurations"
        raise UserError(
            f"the Hub is out of reach and the dataset {source.name!r} at {commit[:12]} {problem}: "
            + ("run once with --no-streaming while the Hub answers" if not folders else "choose one with --task")
        )
    task, version = folders[0].parts[-3:-1]
    with _telling(source, task):
        builder = Cache(dataset_name=short, repo_id=source.name, config_name=task, version=version, hash=commit)
        return _told(iter(builder.as_dataset(split=source.split)), source)


def _load_folder(source: Source, path: Path) -> Iterator[dict]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        with _telling(source, str(path)):
            loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if source.split not in loaded:
                raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(sorted(loaded))}")
            loaded = loaded[source.split]
        return _told(iter(loaded), source)
    from datasets import get_dataset_split_names

    with _telling(source, str(path)):
        splits = get_dataset_split_names(str(path), source.task)
    only = splits[0] if len(splits) == 1 else source.split
    if only not in splits:
        raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(splits)}")
    return _load(source, str(path), source.task, split=only)


def _load(source: Source, *args: object, **kwargs: object) -> Iterator[dict]:
    """Rows, as they stream in or from a copy on disk."""
    from datasets import load_dataset

    with _telling(source, str(args[0]), kwargs.get("revision")):
        dataset = load_dataset(*args, streaming=source.streaming, **kwargs)
        return _told(iter(dataset), source)


def _told(rows: Iterator[dict], source: Source) -> Iterator[dict]:
    try:
        yield from rows
    except Exception as error:
        line = hub.explain(error, "dataset", source.name, source.revision)
        raise UserError(line or f"cannot read the dataset {source.name!r}: {_short(error)}") from error


@contextmanager
def _telling(source: Source, where: str, revision: object = None) -> Iterator[None]:
    """Tell every failure to load in one line."""
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except Exception as error:
        line = hub.explain(error, "dataset", source.name, source.revision)
        if line is None and isinstance(error, DatasetNotFoundError) and "gated" in str(error):
            line = hub.gated("dataset", source.name)  # `datasets` has cut the error of the Hub off
        if line is None and isinstance(error, ValueError) and "split" in str(error).lower():
            line = f"no split {source.split!r} in {source.name!r}: there are {_splits(source, where, revision, error)}"
        if line is None and isinstance(error, ValueError) and "BuilderConfig" in str(error):
            line = f"no configuration {source.task!r} in {source.name!r}, give one with --task: {_short(error)}"
        raise UserError(line or f"cannot load the dataset {source.name!r}: {_short(error)}") from error


def _splits(source: Source, where: str, revision: object, error: Exception) -> str:
    from datasets import get_dataset_split_names

    try:
        return ", ".join(get_dataset_split_names(where, source.task, revision=revision))
    except Exception:
        return _short(error)


@contextmanager
def _patient() -> Iterator[None]:
    """Without progress bars, and without the half hour for which `datasets` asks a silent server again."""
    import datasets

    bars, retries = not datasets.are_progress_bars_disabled(), datasets.config.STREAMING_READ_MAX_RETRIES
    datasets.disable_progress_bars()
    datasets.config.STREAMING_READ_MAX_RETRIES = 2
    try:
        with hub.patient(), quiet():
            yield
    finally:
        datasets.config.STREAMING_READ_MAX_RETRIES = retries
        if bars:
            datasets.enable_progress_bars()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
