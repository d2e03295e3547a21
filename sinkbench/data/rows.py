"""Text to tokens: datasets of any origin, read as one stream."""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinkbench.config import Source
from sinkbench.errors import UserError
from sinkbench.files import SPECIAL, is_special, is_too_deep
from sinkbench.models import embedded, hub
from sinkbench.models.silence import quiet
from sinkbench.signals import check

READ_FIRST = 10 * 2**20  # bytes
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def rows_from(source: Source) -> tuple[Iterator[dict], str | None]:
    """The rows, and what they are of: the commit of a Hub dataset, Python and its library's fingerprint."""
    if source.name == embedded.CODE:
        files = embedded.source_files()
        return iter([{"text": text, "path": name} for name, text in files]), embedded.revision_of(files)
    if source.name == embedded.TEXT:
        return _load(source, "json", data_files=str(embedded.text_file()), split="train"), None
    if source.rows is not None:
        return _read(iter(source.rows), source), None
    path = Path(source.name).expanduser()
    _check_place(path)
    if path.is_file():
        builder = BUILDERS.get(path.suffix.lower())
        if builder is None:
            raise UserError(f"cannot read {path}: a dataset file ends in {', '.join(sorted(BUILDERS))}")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty")
        if builder == "json":
            _check_beginning(path)
        options = {"sample_by": "document"} if builder == "text" else {}
        return _load(source, builder, data_files=glob.escape(str(path)), split="train", **options), None
    if path.is_dir():
        return _load_folder(source, path), None
    if path.is_absolute() or source.name.startswith((".", "~")) or path.suffix.lower() in BUILDERS:
        raise UserError(f"no file or folder {source.name!r} to read a dataset from")
    return _load_from_hub(source)


def _check_place(path: Path) -> None:
    """Refuse what `datasets` would wait for, or would read something else by the name of."""
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names) if path.is_dir() else [path]
    special = next(filter(is_special, files), None)
    if special is not None:
        raise UserError(f"cannot read {special}: {SPECIAL}")
    patterns = "*?[" if path.is_dir() else ""
    if path.exists() and ("::" in str(path) or any(character in str(path) for character in patterns)):
        raise UserError(f"cannot read a dataset from {str(path)!r}: it is taken for a pattern, rename it or its folder")


def _check_beginning(path: Path) -> None:
    """Refuse, as far as `datasets` reads at first, what ends the process within pyarrow 26: deep nesting, null."""
    with path.open("rb") as file:
        data = file.read(READ_FIRST) + file.readline()
    if re.match(rb"(\xef\xbb\xbf)?[\s[]*null", data):
        raise UserError(f"cannot read {path}: its first row is null, not a table of columns")
    if is_too_deep(data):
        raise UserError(f"cannot read {path}: it is nested too deeply")


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
    with _explained(source, task):
        builder = Cache(dataset_name=short, repo_id=source.name, config_name=task, version=version, hash=commit)
        return _read(iter(builder.as_dataset(split=source.split)), source)


def _load_folder(source: Source, path: Path) -> Iterator[dict]:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        with _explained(source, str(path)):
            loaded = load_from_disk(str(path))
        if isinstance(loaded, DatasetDict):
            if source.split not in loaded:
                raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(sorted(loaded))}")
            loaded = loaded[source.split]
        return _read(iter(loaded), source)
    from datasets import get_dataset_split_names

    with _explained(source, str(path)):
        splits = get_dataset_split_names(str(path), source.task)
    only = splits[0] if len(splits) == 1 else source.split
    if only not in splits:
        raise UserError(f"no split {source.split!r} in {path}: there are {', '.join(splits)}")
    return _load(source, str(path), source.task, split=only)


def _load(source: Source, *args: object, **kwargs: object) -> Iterator[dict]:
    """Rows, as they stream in or from a copy on disk."""
    from datasets import load_dataset

    with _explained(source, str(args[0]), kwargs.get("revision")):
        dataset = load_dataset(*args, streaming=source.streaming, **kwargs)
        return _read(iter(dataset), source)


def _read(rows: Iterator[dict], source: Source) -> Iterator[dict]:
    try:
        for row in rows:
            check()
            yield row
    except Exception as error:
        line = hub.explain(error, "dataset", source.name, source.revision)
        raise UserError(line or f"cannot read the dataset {source.name!r}: {_short(error)}") from error


@contextmanager
def _explained(source: Source, where: str, revision: object = None) -> Iterator[None]:
    """Every failure to load in one line."""
    from datasets.exceptions import DatasetNotFoundError

    check()
    try:
        yield
        check()
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
def patiently() -> Iterator[None]:
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
