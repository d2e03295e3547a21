"""What determines the numbers of a run: runs that agree in it have one result, whatever their files are called."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench.config import RunOptions
from sinkbench.models.gguf import digest
from sinkbench.models.loading import DTYPES, ModelSource
from sinkbench.strategies import Chosen

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def identified(options: RunOptions, chosen: Chosen, tokens: Tensor, of: str | None = None) -> dict[str, Any]:
    """The part of a run's record that says what determines it, and ``key``, a hash of that.

    The device is no part of it: it decides what a result costs, not what it is. ``of`` are the :func:`weights`, where
    they are known already.
    """
    about = {
        "weights": of or weights(options.model),
        "random_weights": options.model.random_weights,
        "dtype": dtype(options.model),
        "quantization": options.model.quantization,
        "strategy": chosen.identity,
        "engine": options.engine,
        "num_tokens": options.num_tokens,
        "tokens": fingerprint(tokens),
    }
    return {"determined_by": about, "key": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def dtype(source: ModelSource) -> str:
    """``auto`` resolved as far as it can be without the model."""
    if source.dtype in DTYPES:
        return source.dtype
    return "checkpoint" if torch.cuda.is_available() else "float32"


def weights(source: ModelSource) -> str:
    """The commit of a Hub model; a SHA-256 over the files of a local one."""
    location = source.location
    if "revision" in location:
        return f"{source.name}@{location['revision']}"
    path = Path(location["pretrained_model_name_or_path"])
    if path.is_file():
        return _sum([path])
    if "gguf_file" in location:
        return _sum([path / location["gguf_file"]])
    patterns = ("config.json",) if source.random_weights else WEIGHTS
    return _sum(sorted(file for pattern in patterns for file in path.glob(pattern)))


def _sum(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        about = file.stat()
        total.update(f"{file.name} {_digest(file, about.st_size, about.st_mtime_ns)}\n".encode())
    return f"sha256:{total.hexdigest()}"


@lru_cache(maxsize=1024)
def _digest(file: Path, size: int, changed: int) -> str:
    """Remembered while ``file`` stays as it is: every cell of a sweep asks for the same gigabytes."""
    return digest(file)


def fingerprint(tokens: Tensor) -> str:
    """SHA-256 of token ids as little-endian 64-bit integers."""
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
