"""Cells as tasks of a Ray cluster; results come back to this machine and are verified before they count.

A task runs its cell in a folder of its own and answers with the files, so workers need no disk in common. A worker that
is lost takes nothing with it but time: Ray runs the task again elsewhere.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sinkbench.errors import UserError
from sinkbench.estimate import Device, estimate
from sinkbench.launchers.local import Shelf
from sinkbench.records import COLUMNS, put, rows_of, write_json
from sinkbench.runs import RunOptions, RunResult, failure, run
from sinkbench.shapes import read_shape

LOST = 3  # workers that a cell may lose beyond the retries asked for


@dataclass(frozen=True)
class Brought:
    """What a task brings back: the rows and the record as the run wrote them, and a SHA-256 over both."""

    result: RunResult
    rows: bytes
    record: bytes
    sha256: str


def launch(
    cells: Sequence[RunOptions],
    retries: int,
    started: Callable[[int], None],
    finished: Callable[[int, RunResult], None],
) -> None:
    """Carry out ``cells`` on the cluster that ``RAY_ADDRESS`` names, or one that runs here, or one made for this.

    Raises:
        UserError: Ray is not installed.
    """
    ray = _ray()
    with _connected(ray):
        memory = _gpu_memory(ray)
        tries: Counter[int] = Counter()
        pending: dict[Any, int] = {}

        def submit(index: int) -> None:
            needs = _needs(cells[index], memory, ray.cluster_resources())
            task = ray.remote(max_retries=retries + LOST, retry_exceptions=False, **needs)(work)
            pending[task.remote(cells[index])] = index
            tries[index] += 1

        for index in range(len(cells)):
            submit(index)
            started(index)
        try:
            while pending:
                (reference, *_), _ = ray.wait(list(pending), num_returns=1)
                index = pending.pop(reference)
                result = _outcome(ray, reference, cells[index])
                if result.exit_reason.startswith("failed") and tries[index] <= retries:
                    submit(index)
                else:
                    finished(index, result)
        except KeyboardInterrupt:
            for reference, index in pending.items():
                ray.cancel(reference, force=True)
                options = cells[index]
                finished(index, RunResult(options.experiment, options.csv, exit_reason="interrupted (SIGINT)"))


def work(options: RunOptions) -> Brought:
    """One cell, on a worker."""
    with TemporaryDirectory(prefix="sinkbench-") as folder:
        here = replace(options, output_dir=Path(folder), overwrite=False, resume=False)
        result = run(here, load=_shelf().load)
        rows = here.csv.read_bytes() if here.csv.exists() else b""
        record = here.csv.with_suffix(".json").read_bytes()
    return Brought(replace(result, csv=options.csv), rows, record, _sum(rows, record))


@lru_cache(maxsize=1)
def _shelf() -> Shelf:
    """The model of this worker process, which may run several cells one after the other."""
    return Shelf()


def _sum(rows: bytes, record: bytes) -> str:
    return hashlib.sha256(hashlib.sha256(rows).digest() + record).hexdigest()


def _outcome(ray: Any, reference: Any, options: RunOptions) -> RunResult:
    try:
        brought = ray.get(reference)
        place(brought, options)
    except ray.exceptions.RayTaskError as error:
        return RunResult(options.experiment, options.csv, exit_reason=failure(error.cause or error))
    except (ray.exceptions.RayError, UserError) as error:
        return RunResult(options.experiment, options.csv, exit_reason=failure(error))
    return brought.result


def place(brought: Brought, options: RunOptions) -> None:
    """Put what was brought where ``options`` say, once it is known to be whole.

    Raises:
        UserError: it is not, or another run's result is there.
    """
    record = verified(brought, options)
    path = options.csv.with_suffix(".json")
    if options.csv.exists() and not options.overwrite and _key_in(path) != record["key"]:
        raise UserError(f"{options.csv} already exists, of another run: give --overwrite, or another --output-dir")
    record["command"] = ["sinkbench", *sys.argv[1:]]
    record["options"] |= {"output_dir": str(options.output_dir)}
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {options.output_dir}: {error.strerror or error}") from error
    write_json(path, record)  # before the rows: a record without them is no result, and what is there is done again
    if brought.rows:
        put(options.csv, brought.rows)


def verified(brought: Brought, options: RunOptions) -> dict[str, Any]:
    """The record of what was brought.

    Raises:
        UserError: a byte differs from what the worker sent, or rows are missing, double or not finite.
    """
    where = f"what a worker brought back of {options.csv.name}"
    if _sum(brought.rows, brought.record) != brought.sha256:
        raise UserError(f"{where} is damaged: its SHA-256 does not fit")
    record = json.loads(brought.record)
    cells = rows_of(brought.rows, COLUMNS, options.csv).cells
    right = all(
        int(row["input_length"]) == number and math.isfinite(float(row["nll"]))
        for number, row in enumerate(cells, start=1)
    )
    if not right or len(cells) != record["rows"]:
        raise UserError(f"{where} is not whole: {len(cells)} rows where its record says {record['rows']}")
    return record


def _key_in(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("key")
    except (OSError, ValueError, AttributeError):
        return None


def _needs(options: RunOptions, gpu_memory: int, cluster: dict[str, float]) -> dict[str, float]:
    """What Ray is to keep free for a cell: a core, GPUs where there are any, and host memory where it can be told."""
    needs: dict[str, float] = {"num_cpus": 1}
    kind = "cuda" if gpu_memory else "cpu"
    try:
        size = estimate(options, read_shape(options.model), Device(kind, gpu_memory, 1.0, 1.0)).vram_bytes
    except UserError:
        size = 0
    if gpu_memory:
        needs["num_gpus"] = min(max(1, math.ceil(size / (0.95 * gpu_memory))), int(cluster["GPU"]))
    if size and size <= cluster.get("memory", 0):
        needs["memory"] = size
    return needs


def _gpu_memory(ray: Any) -> int:
    """Bytes of one GPU of the cluster; 0 where there is none."""
    if not ray.cluster_resources().get("GPU"):
        return 0

    def read() -> int:
        import torch

        return torch.cuda.get_device_properties(0).total_memory

    return ray.get(ray.remote(num_gpus=1)(read).remote())


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("--launcher ray needs Ray: pip install 'sinkbench[ray]'") from error
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Within this context there is a cluster; one that was there before stays."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
