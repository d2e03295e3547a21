"""GGUF files as folders of safetensors, unpacked once: reading GGUF takes half a minute, the folder a second."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sinkbench.errors import UserError
from sinkbench.files import read_json
from sinkbench.models.checkpoints import check_complete
from sinkbench.models.silence import silent
from sinkbench.results.files import json_text
from sinkbench.signals import check

LIMIT = 2**30  # files up to this size are unpacked and kept
SUMS = "sums.json"  # the last file written: what the others must be
DAY = 86_400


def cache_folder() -> Path:
    """Where unpacked models are kept: ``$SINKBENCH_CACHE``, or ``sinkbench`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("SINKBENCH_CACHE") or Path(base) / "sinkbench")


def unpacked(path: Path) -> dict[str, Any]:
    """The arguments by which transformers finds the model in ``path``: its unpacked folder, or the file itself.

    A folder that is not as it was written is unpacked anew.

    Raises:
        UserError: the file is not a whole GGUF file.
    """
    # absolute: transformers would take a file of this name in the current folder first
    straight = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": str(path.absolute())}
    if path.stat().st_size > LIMIT:
        check_whole(path)
        return straight
    folder = cache_folder() / f"{path.stem}-{digest(path)[:16]}"  # by what it holds: its time may be another file's
    try:
        if not _intact(folder):
            check_whole(path)
            _renew(folder, straight)
    except OSError as error:  # no room or no right to write: the file itself will do
        logging.getLogger(__name__).debug("cannot keep the unpacked model: %s", error)
        return straight
    return {"pretrained_model_name_or_path": str(folder)}


def check_whole(path: Path) -> None:
    """Refuse what is not a GGUF file from its first byte to its last.

    Raises:
        UserError: naming the file.
    """
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except Exception as error:
        raise UserError(
            f"{path} is not a whole GGUF file ({path.stat().st_size:,} bytes): download or copy it again"
        ) from error


def _intact(folder: Path) -> bool:
    try:
        sums = read_json(folder / SUMS)
        whole = {path.name for path in folder.iterdir()} == {*sums, SUMS}
        return whole and len(sums) > 0 and all(digest(folder / name) == value for name, value in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, remembered while it looks as it did: a run asks twice, and each cell of a sweep again."""
    check()
    about = path.stat()
    return _digest(path, (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


@lru_cache(maxsize=1024)
def _digest(path: Path, seen: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _renew(folder: Path, location: dict[str, Any]) -> None:
    """Unpack beside ``folder``, then put the result in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(".unpacking-*"):  # by processes that were killed
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    parts = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".unpacking-"))
    try:
        _unpack(location, parts)
        (parts / SUMS).write_text(json_text({p.name: digest(p) for p in parts.iterdir()}), encoding="utf-8")
        if folder.exists() and not _intact(folder):
            folder.rename(parts.with_suffix(".damaged"))
        parts.rename(folder)
    except OSError:
        if not _intact(folder):  # otherwise another process was quicker
            raise
    finally:
        shutil.rmtree(parts, ignore_errors=True)
        shutil.rmtree(parts.with_suffix(".damaged"), ignore_errors=True)


def _unpack(location: dict[str, Any], folder: Path) -> None:
    with silent():
        AutoTokenizer.from_pretrained(**location).save_pretrained(folder)
        check()
        loaded: Any = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        check()
        check_complete(location["gguf_file"], info)
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):  # the weights are plain floats by now
            del model.config.quantization_config
        model.save_pretrained(folder)
