"""What was kept, on file: how long every token lived, in every layer and head, beside the rows of a run."""

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sinkbench.errors import UserError
from sinkbench.results.files import replace_file

VERSION = 1
HELD, ABSENT = 0, -1  # in place of a lifetime: held at the end; no such head in this layer


@dataclass(frozen=True)
class Lifetimes:
    """How long each token of a stream was held, in the layers that a strategy governs.

    Attributes:
        strategy: what was kept.
        layers: numbers of the layers in the model, ``(L,)``.
        windows: entries that each of them holds at most between two steps, 0 without a bound, ``(L,)``.
        lifetime: steps that could attend to each token, its own included, int32, ``(L, H, n)``; :data:`HELD` where it
            was still held at the end, :data:`ABSENT` where a layer has fewer heads of keys and values than others.
    """

    strategy: str
    layers: np.ndarray
    windows: np.ndarray
    lifetime: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of the stream."""
        return self.lifetime.shape[-1]

    def heads(self) -> list[np.ndarray]:
        """The lifetimes of each layer, ``(heads that it has, n)``."""
        return [layer[layer[:, 0] != ABSENT] if self.tokens else layer for layer in self.lifetime]


def trace_of(csv: Path) -> Path:
    """Where the trace of the run lies whose rows are in ``csv``."""
    return csv.with_suffix(".trace.npz")


def write_trace(path: Path, kept: Lifetimes) -> None:
    """Write a trace whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    file = io.BytesIO()
    np.savez_compressed(
        file,
        lifetime=kept.lifetime,
        layer=kept.layers.astype(np.int32),
        window=kept.windows.astype(np.int64),
        strategy=np.array(kept.strategy),
        tokens=np.array(kept.tokens),
        version=np.array(VERSION),
    )
    put_trace(path, file.getvalue())


def put_trace(path: Path, data: bytes) -> None:
    """As :func:`write_trace`, of the bytes of one."""
    replace_file(path, data)


def tokens_in(path: Path) -> int | None:
    """Tokens that a trace covers; ``None`` where there is none that can be read."""
    try:
        with np.load(path) as arrays:
            return int(arrays["tokens"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def read_trace(path: Path) -> Lifetimes:
    """A trace as it was written.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        with np.load(path) as arrays:
            if int(arrays["version"]) > VERSION:
                raise UserError(f"cannot read {path}: a newer sinkbench wrote it")
            kept = Lifetimes(str(arrays["strategy"]), arrays["layer"], arrays["window"], arrays["lifetime"])
        sizes = kept.lifetime.shape[:1]
        if kept.lifetime.ndim != 3 or kept.layers.shape != sizes or kept.windows.shape != sizes:
            raise ValueError("its arrays do not fit")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}): run with --trace again, or remove the file") from error
    return kept
