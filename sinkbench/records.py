"""What is written down: one row a predicted token, and everything needed to repeat the run."""

import fcntl
import json
import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Self

import torch

from sinkbench import __version__
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError

COLUMNS = ("input_length", "nll", "ppl", "overall_ppl", "cuda_vram_allocated", "latency", "kv_cache_bytes", "token")
PACKAGES = ("torch", "transformers", "datasets", "numpy", "accelerate", "safetensors", "gguf")


def perplexity(mean_nll: float) -> float:
    """``exp(mean_nll)``; ``inf`` only where no float64 can hold it."""
    return math.exp(mean_nll) if mean_nll < 709.78 else math.inf


class RowWriter:
    """Writes steps to a CSV file, each row handed to the operating system when it is complete.

    So a process that is killed at any moment leaves every completed row behind. The file is locked: a second
    process that writes to it is refused. ``more`` names columns behind the usual ones.

    Raises:
        UserError: the file exists and ``overwrite`` is not set, is being written, or cannot be written.
    """

    def __init__(self, path: Path, overwrite: bool = False, more: tuple[str, ...] = ()) -> None:
        self.path = path
        self.columns = (*COLUMNS, *more)
        self.rows = 0
        self.nll_sum = 0.0
        self._file = _open(path, overwrite)
        self.replaces = self._file.tell() > 0  # an older result, which stays until the first row

    def write(self, steps: Steps, predicted: Sequence[int], more: Sequence[float | None] = ()) -> None:
        """Append the rows of ``steps``; ``predicted`` are the ids of the tokens they predict.

        ``more`` are the values of the further columns, the same in all these rows; ``None`` leaves one empty.
        """
        vram = "" if steps.vram is None else repr(steps.vram)
        latency = "" if steps.latency is None else repr(steps.latency)
        behind = "".join("," if value is None else f",{value!r}" for value in more)
        lines = []
        if not self.rows:
            self._file.truncate(0)
            lines.append(",".join(self.columns) + "\n")
        for nll, token, held in zip(steps.nll, predicted, steps.kv_cache_bytes, strict=True):
            self.rows += 1
            self.nll_sum += nll
            ppl, overall = perplexity(nll), perplexity(self.nll_sum / self.rows)
            costs = f"{vram},{latency},{held}"
            lines.append(f"{self.rows},{nll!r},{ppl!r},{overall!r},{costs},{token}{behind}\n")
        self._file.write("".join(lines))
        self._file.flush()

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean NLL so far."""
        return perplexity(self.mean_nll)

    @property
    def mean_nll(self) -> float:
        """Mean of all NLLs so far, in float64."""
        return self.nll_sum / self.rows if self.rows else math.nan

    def close(self) -> None:
        """Close the file; one that never got a row is removed, unless it is an older result."""
        if not self.rows and not self.replaces:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _open(path: Path, overwrite: bool) -> TextIOWrapper:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - closed by RowWriter
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"another process is writing {path}: wait for it, or give another --output-dir") from error
    if file.tell() and not overwrite:
        file.close()
        raise UserError(f"{path} already exists: give --overwrite to replace it, or another --output-dir")
    return file


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write ``record`` whole or not at all."""
    parts = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        parts.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        parts.replace(path)
    except OSError as error:
        parts.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what decides the numbers."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sinkbench": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_name() -> str:
    """The devices at hand, in words."""
    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
