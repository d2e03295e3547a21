"""What is written down: one row a predicted token, and everything needed to repeat the run."""

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sinkbench import __version__
from sinkbench.results.files import json_text, replace_file
from sinkbench.signals import undisturbed

PACKAGES = ("torch", "transformers", "datasets", "numpy", "accelerate", "safetensors", "gguf")


@undisturbed()
def write_json(path: Path, record: dict[str, Any], ready: Callable[[], None] = lambda: None) -> None:
    """Write ``record`` whole or not at all; ``ready`` is called when it is on the disk and about to get its name.

    Raises:
        UserError: it cannot be written.
    """
    replace_file(path, json_text(record, indent=2).encode(), ready)


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str | None]:
    """Versions of Python and of what decides the numbers."""
    found: dict[str, str | None] = {"python": platform.python_version(), "sinkbench": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_name(device_map: str | None = None) -> str:
    """The devices at hand, in words; ``device_map`` is that of the run."""
    if torch.cuda.is_available() and device_map != "cpu":
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{_processor()} CPU, {torch.get_num_threads()} threads"


@cache
def _processor() -> str:
    """The name of the CPU; that of its kind where the system does not say it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].replace("CPU", "").split())
    return platform.processor() or platform.machine()
