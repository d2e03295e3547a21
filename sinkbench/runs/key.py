"""The key of a result: a hash of all that decides its numbers.

Results with one key have the same NLLs: in float32 up to rounding, in half precision up to what kernels of one kind of
device differ by. It covers the weights, the ids of all tokens, the dtype, the strategy with its parameters, positions,
format and, where it is not built in, its source, and every option that decides as it stands
(:attr:`sinkbench.config.Option.decides`). What it does not cover is the device: that decides what a result costs and
how far it comes, so a sweep compares devices too (:mod:`sinkbench.sweeps.plan`).
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench.config import ModelSource, RunConfig
from sinkbench.models.gguf import digest
from sinkbench.models.loading import TORCH_DTYPES, Checkpoint
from sinkbench.strategies import Chosen

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "config.json")


def identified(config: RunConfig, chosen: Chosen, tokens: Tensor, weights: str) -> dict[str, Any]:
    """The part of a run's record that says what determines it, and ``key``, a hash of that.

    ``weights`` are those of :func:`weights_of`.
    """
    about = {
        "weights": weights,
        "dtype": dtype(config.model),
        "strategy": chosen.identity,
        "tokens": fingerprint(tokens),
        **config.deciding,
    }
    if config.random_weights:  # each kind of device has a generator of its own
        about["drawn_on"] = "cpu" if config.device_map == "cpu" or not torch.cuda.is_available() else "cuda"
    return {"determined_by": about, "key": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def dtype(source: ModelSource) -> str:
    """``auto`` resolved as far as it can be without the model."""
    if source.dtype in TORCH_DTYPES:
        return source.dtype
    return "checkpoint" if torch.cuda.is_available() else "float32"


def weights_of(checkpoint: Checkpoint) -> str:
    """The commit of a Hub model; a SHA-256 over the files of a local one, and over its own code where that runs."""
    arguments, trusted = checkpoint.arguments, checkpoint.source.trust_remote_code
    if "revision" in arguments:
        return f"{checkpoint.source.name}@{arguments['revision']}"
    path = Path(arguments["pretrained_model_name_or_path"])
    if path.is_file():
        return _sum([path])
    if "gguf_file" in arguments:
        return _sum([path / arguments["gguf_file"]])
    weights = ("config.json",) if checkpoint.source.random_weights else WEIGHTS
    patterns = [*weights, *(["*.py"] if trusted else [])]
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
