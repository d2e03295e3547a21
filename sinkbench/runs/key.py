"""The key of a result: a hash of all that decides its numbers.

Results with one key have the same NLLs: in float32 up to rounding, in half precision up to what kernels of one kind of
device differ by. It covers the weights with the configuration and the code that a model brings, the ids of all tokens,
the dtype, the strategy with its parameters, positions, format and, where it is not built in, its source with what that
imports, the reference likewise where there is one, and every option that decides as it stands
(:attr:`sinkbench.config.Option.decides`). What it does not cover is
the device: that decides what a result costs and how far it comes, so a sweep compares devices too
(:mod:`sinkbench.sweeps.plan`). Nor are versions of packages in it, which are on record, nor files that code reads by
itself.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench.config import ModelSource, RunConfig
from sinkbench.errors import UserError
from sinkbench.models.gguf import digest
from sinkbench.models.loading import TORCH_DTYPES, Checkpoint, code_elsewhere
from sinkbench.strategies import Chosen
from sinkbench.strategies.reference import reference_by

CONFIGURATIONS = ("config.json", "config.*.json")  # transformers may take the one for its version
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.index.json")


def identified(config: RunConfig, chosen: Chosen, streams: Sequence[Tensor], weights: str) -> dict[str, Any]:
    """The part of a run's record that says what determines it, and ``key``, a hash of that.

    ``weights`` are those of :func:`weights_of`.
    """
    about = {
        "weights": weights,
        "dtype": dtype(config.model),
        "strategy": chosen.identity,
        "tokens": fingerprint(*streams),
        **config.deciding,
    }
    reference = reference_by(config)
    if reference is not None:
        about["reference"] = reference.identity
    if config.random_weights:  # each kind of device has a generator of its own
        about["drawn_on"] = "cpu" if config.device_map == "cpu" or not torch.cuda.is_available() else "cuda"
    return {"determined_by": about, "key": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def dtype(source: ModelSource) -> str:
    """``auto`` resolved as far as it can be without the model."""
    if source.dtype in TORCH_DTYPES:
        return source.dtype
    return "checkpoint" if torch.cuda.is_available() else "float32"


def weights_of(checkpoint: Checkpoint) -> str:
    """The commit of a Hub model; a SHA-256 over the files of a local one; with either, the code of its own that runs.

    Of a model that was given as an object, its fingerprint (:mod:`sinkbench.models.given`).

    Raises:
        UserError: a file cannot be read.
    """
    if checkpoint.fingerprint:
        return checkpoint.fingerprint
    arguments, trusted = checkpoint.arguments, checkpoint.source.trust_remote_code
    code = " with ".join(["", *code_elsewhere(checkpoint)]) if trusted else ""
    if "revision" in arguments:
        return f"{checkpoint.source.name}@{arguments['revision']}{code}"
    path = Path(arguments["pretrained_model_name_or_path"])
    try:
        if path.is_file():
            return _sum(path.parent, [path, *(path.parent.rglob("*.py") if trusted else ())]) + code
        if "gguf_file" in arguments:
            return _sum(path, [path / arguments["gguf_file"]]) + code
        return _sum(path, _deciding(path, checkpoint.source)) + code
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from error


def _deciding(folder: Path, source: ModelSource) -> list[Path]:
    """The files of a model that decide its numbers, those that its indices name included.

    What is not there or cannot be understood is left to whoever loads the model, who says so.
    """
    patterns = [*CONFIGURATIONS, *([] if source.random_weights else WEIGHTS)]
    found = {file for pattern in patterns for file in folder.glob(pattern)}
    named = _read(folder / "config.json").get("transformers_weights")
    if isinstance(named, str) and not source.random_weights:
        found.add(folder / named)
    for index in [file for file in found if file.name.endswith(".index.json")]:
        shards = _read(index).get("weight_map")
        found |= {folder / shard for shard in _texts(shards)} | {index.parent / shard for shard in _texts(shards)}
    found |= set(folder.rglob("*.py")) if source.trust_remote_code else set()
    return [file for file in found if file.is_file()]


def _texts(table: Any) -> set[str]:
    return {value for value in table.values() if isinstance(value, str)} if isinstance(table, dict) else set()


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it is not there, or no object."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _sum(folder: Path, files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for name, file in sorted({os.path.relpath(file, folder): file for file in files}.items()):
        total.update(f"{name} {digest(file)}\n".encode(errors="surrogateescape"))
    return f"sha256:{total.hexdigest()}"


def fingerprint(*streams: Tensor) -> str:
    """SHA-256 of token ids as little-endian 64-bit integers; of several streams, the length of each before its ids."""
    total = hashlib.sha256()
    for tokens in streams:
        if len(streams) > 1:
            total.update(len(tokens).to_bytes(8, "little"))
        total.update(tokens.numpy().astype("<i8").tobytes())
    return total.hexdigest()
