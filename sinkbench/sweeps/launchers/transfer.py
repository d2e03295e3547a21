"""A cell carried out elsewhere: its files travel as bytes, and are verified before they count."""

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np

from sinkbench.config import RunConfig
from sinkbench.errors import UserError
from sinkbench.files import parse_json, read_json
from sinkbench.results.columns import further_columns, row_columns
from sinkbench.results.rows import is_whole, predictions_in
from sinkbench.results.traces import put_trace, trace_of
from sinkbench.runs.record import write_json
from sinkbench.runs.result import RunResult
from sinkbench.runs.run import run
from sinkbench.runs.writer import put, rows_of
from sinkbench.sweeps.launchers.local import Shelf


@dataclass(frozen=True)
class Transfer:
    """What a task brings back: the rows, the record and the trace as the run wrote them, and a SHA-256 over all."""

    result: RunResult
    rows: bytes
    record: bytes
    sha256: str
    trace: bytes = b""


def work(options: RunConfig, source: bytes | None = None) -> Transfer:
    """One cell, on a worker, in a folder of its own; ``source`` is that of a strategy from a file, which is not here.

    Raises:
        UserError: as :func:`sinkbench.runs.run.run`.
    """
    with scratch() as folder:
        here = options.but(output_dir=folder, overwrite=False, resume=False)
        if source is not None:
            file = folder / "strategy.py"
            file.write_bytes(source)
            here = here.but(experiment=f"{file}:{options.experiment.rpartition(':')[2]}")
        result = run(here, load=_shelf().load)
        rows = here.csv.read_bytes() if here.csv.exists() else b""
        record = here.csv.with_suffix(".json").read_bytes()
        traced = trace_of(here.csv)
        trace = traced.read_bytes() if traced.exists() else b""
    return Transfer(replace(result, csv=options.csv), rows, record, checksum(rows, record, trace), trace)


@lru_cache(maxsize=1)
def _shelf() -> Shelf:
    """The model of this worker process, which may run several cells one after the other."""
    return Shelf()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that goes when this context ends; those that killed processes left on this machine go first.

    A folder is locked while its process lives. The lock of their parent keeps a new one from being taken for a left
    one before it is locked.
    """
    parent = Path(gettempdir()) / f"sinkbench-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    with _locked(parent, wait=True):
        for left in parent.iterdir():
            with _locked(left) as free:
                if free:
                    shutil.rmtree(left, ignore_errors=True)
        own = TemporaryDirectory(dir=parent)
        held = os.open(own.name, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield Path(own.name)
    finally:
        own.cleanup()
        os.close(held)


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock of ``folder`` could be had; it is held within this context."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its process has just removed it
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        os.close(file)


def checksum(rows: bytes, record: bytes, trace: bytes = b"") -> str:
    """SHA-256 over those of the rows and the trace, and the record."""
    parts = [hashlib.sha256(part).digest() for part in (rows, trace)]
    return hashlib.sha256(b"".join([*parts, record])).hexdigest()


def place(transfer: Transfer, options: RunConfig) -> None:
    """Put what a worker sent where ``options`` say, once it is known to be whole.

    Raises:
        UserError: it is not, another run's result is there, or it cannot be written.
    """
    record = verified(transfer, options)
    path = options.csv.with_suffix(".json")
    if options.csv.exists() and not options.overwrite and _key_in(path) != record["key"]:
        raise UserError(f"{options.csv} already exists, of another run: give --overwrite, or another --output-dir")
    if not transfer.rows and options.csv.exists():
        return  # an older result stays until there is a first row, as with a run here
    record["command"] = ["sinkbench", *sys.argv[1:]]
    record["sessions"] = [{**session, "command": record["command"]} for session in record["sessions"]]
    record["options"] = options.model_dump(mode="json")
    if transfer.trace:
        record["trace"] = trace_of(options.csv).name
    for about, name in (("model", options.model_name_or_path), ("dataset", options.dataset_name)):
        if about in record:
            record[about]["name"] = name
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.output_dir}: {error.strerror or error}") from error
    write_json(path, record)  # before the rows: a record without them is no result, and what is there is done again
    if transfer.rows:
        put(options.csv, transfer.rows)
    if transfer.trace:
        put_trace(trace_of(options.csv), transfer.trace)


def verified(transfer: Transfer, options: RunConfig) -> dict[str, Any]:
    """The record of what a worker sent.

    Raises:
        UserError: a byte differs from what the worker sent, or rows are missing, double or other than its record says.
    """
    where = f"what a worker sent back of {options.csv.name}"
    if checksum(transfer.rows, transfer.record, transfer.trace) != transfer.sha256:
        raise UserError(f"{where} is damaged: its SHA-256 does not fit")
    try:
        record = parse_json(transfer.record)
        said = record["rows"], record["key"]
        _check_kinds(record)
        rows = rows_of(transfer.rows, row_columns(further_columns(options)), options.csv).frame
        wrong = len(rows) - int(np.isfinite(rows["nll"]).sum())
        right = is_whole(rows, options.every) and predictions_in(rows) == said[0]
        right = right and (
            wrong == record["rows_not_finite"] or (options.every > 1 and wrong < record["rows_not_finite"])
        )
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{where} is not whole: {error}") from error
    if not right or len(rows) != record.get("rows_written", said[0]):
        raise UserError(f"{where} is not whole: {len(rows)} rows where its record says {said[0]}")
    return record


def _check_kinds(record: dict[str, Any]) -> None:
    """Refuse a record that no run wrote, whatever its checksum."""
    tables = [*record["sessions"], *(record[about] for about in ("model", "dataset") if about in record)]
    if not all(isinstance(table, dict) for table in tables) or not isinstance(record["key"], str):
        raise ValueError("its record is none of a run")


def _key_in(path: Path) -> str | None:
    try:
        return read_json(path).get("key")
    except (OSError, ValueError, AttributeError):
        return None
