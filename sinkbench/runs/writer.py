"""The rows of a run, written as they come: one a predicted token."""

import fcntl
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from sinkbench.errors import UserError
from sinkbench.files import SPECIAL, is_special, read_bytes
from sinkbench.results.columns import BASE_COLUMNS, row_columns
from sinkbench.results.files import is_at, replace_file
from sinkbench.results.folders import make_folder, remove_empty
from sinkbench.results.rows import Damage, Rows, header_of, parse
from sinkbench.results.traces import trace_of
from sinkbench.signals import undisturbed

if TYPE_CHECKING:
    from sinkbench.engines.step import Steps

Value: TypeAlias = float | int | None
TRIES = 100  # to open a file whose folder others make and remove


def perplexity(mean_nll: float) -> float:
    """``exp(mean_nll)``: ``inf`` only where no float64 can hold it, and no number where ``mean_nll`` is none."""
    return math.inf if mean_nll >= 709.78 else math.exp(mean_nll)


def sum_behind(overall_ppl: float, rows: int) -> float:
    """The sum of the NLLs of ``rows`` tokens, by the ``overall_ppl`` of the last one."""
    return math.log(overall_ppl) * rows if overall_ppl > 0 else math.nan


def complete_rows(path: Path, columns: Sequence[str]) -> Rows:
    """The rows of a file that a :class:`RowWriter` wrote; a last one that was cut does not count.

    Raises:
        UserError: it cannot be read, has other columns, or is damaged before its last row.
    """
    try:
        return rows_of(read_bytes(path), columns, path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def rows_of(data: bytes, columns: Sequence[str], path: Path) -> Rows:
    """As :func:`complete_rows`, of the bytes of a file that is, or will be, at ``path``."""
    try:
        header = header_of(data)
        if header and header != list(columns):
            raise UserError(f"cannot go on with {path}: its columns are not {', '.join(columns)}; give --overwrite")
        return parse(data, columns)
    except Damage as error:
        what = str(error) if error.line is None else f"line {error.line} is damaged ({error.what})"
        raise UserError(f"cannot go on with {path}: {what}; give --overwrite to begin anew") from error


class RowWriter:
    """Writes steps to a CSV file, each row handed to the operating system when it is complete.

    So a process that is killed at any moment leaves every completed row behind. The file is locked: a second
    process that writes to it is refused. ``more`` names columns behind those of every file; with ``resume`` a file
    that exists can be taken up. With ``every`` only each so many-th row is written, and the last of a stream; means are
    over all. The sum of NLLs is then, behind each row that is written, what that row says of it: whoever goes on behind
    a row goes on with the same sum. With ``gaps`` input lengths are those of the steps, which need not follow each
    other.

    Raises:
        UserError: the file exists and neither ``overwrite`` nor ``resume`` is set, is being written, or cannot be
            written.
        ValueError: no measure is declared for one of ``more``.
    """

    def __init__(
        self,
        path: Path,
        overwrite: bool = False,
        more: Iterable[str] = (),
        resume: bool = False,
        every: int = 1,
        gaps: bool = False,
    ) -> None:
        self.path, self.every, self.gaps = path, every, gaps
        self.columns = row_columns(more)
        self._further = self.columns[len(BASE_COLUMNS) :]
        self.rows = 0  # of all tokens that were predicted
        self.written = 0  # of these, in the file
        self._left = ""  # the last one, where it is not
        self.nll_sum = 0.0
        self.not_finite = 0  # NLLs that are no numbers
        self.latencies: list[float] = []  # of rows that were taken up
        self._file, self._made = _open(path, overwrite or resume)
        self._size = 0  # bytes of complete rows
        self.replaces = self._file.tell() > 0  # an older result, which stays until the first row
        self.begun = False

    def begin(self) -> None:
        """Give up an older result, or what follows the rows that were taken up of it; and the trace of fewer rows.

        To be called before the new record is in place.
        """
        trace_of(self.path).unlink(missing_ok=True)
        self.trim()

    def trim(self) -> None:
        """Give up an older result, or what follows the rows that were taken up of it."""
        self.begun = True
        self._file.truncate(self._size)
        self.replaces = self.replaces and self.rows > 0

    def take_up(self, rows: Rows, nll_sum: float, count: int | None = None) -> None:
        """Go on behind ``rows``, which the file holds; ``nll_sum`` is that of their NLLs, added up as they come.

        Where not every row was written, ``count`` says of how many these are.
        """
        self._size, self.written, self.nll_sum = rows.size, len(rows), nll_sum
        self.rows = len(rows) if count is None else count
        self.not_finite = sum(not math.isfinite(nll) for nll in rows.frame["nll"])
        self.latencies = rows.frame["latency"].dropna().tolist()

    def write(
        self,
        steps: "Steps",
        predicted: Sequence[int],
        more: Mapping[str, Sequence[Value]] | Sequence[Value] = (),
        last: int | None = None,
    ) -> None:
        """Append the rows of ``steps``; ``predicted`` are the ids of the tokens they predict.

        ``more`` are the further columns by name, a value a row, or one value for each column, the same in all these
        rows; ``None``, and a column that is not there, leaves a cell empty. ``last`` is the input length of the last
        row of the stream, where not every row is written. With ``stream`` among the columns, or gaps, input lengths are
        those of ``steps``; without, they go on from row to row.

        Raises:
            UserError: the disk is full, or the like; the file then ends with its last complete row.
            ValueError: ``more`` has a column that this file has not, or not as many values as there are rows.
        """
        vram = "" if steps.vram is None else repr(steps.vram)
        latency = "" if steps.latency is None else repr(steps.latency)
        behind = self._behind(more, len(steps.nll))
        lines, left = [], self._left
        if not self.begun:
            self.begin()
        if not self.written:
            lines.append(",".join(self.columns) + "\n")
        rows, nll_sum, written = self.rows, self.nll_sum, self.written
        shift = steps.first - 1 - rows if self.gaps or "stream" in self._further else 0
        for nll, token, held, further in zip(steps.nll, predicted, steps.kv_cache_bytes, behind, strict=True):
            rows += 1
            nll_sum += nll
            length, mean = rows + shift, perplexity(nll_sum / rows)
            line = f"{length},{nll!r},{perplexity(nll)!r},{mean!r},{vram},{latency},{held},{token}{further}\n"
            if length % self.every and length != last:
                left = line
                continue
            lines.append(line)
            written, left = written + 1, ""
            if self.every > 1:
                nll_sum = sum_behind(mean, rows)
        self._append("".join(lines) if written > self.written else "")
        self.rows, self.nll_sum, self.written, self._left = rows, nll_sum, written, left
        self.not_finite += sum(not math.isfinite(nll) for nll in steps.nll)

    def write_left(self) -> None:
        """Append the last row, where it was left out: that of a stream that was broken off."""
        if self._left:
            header = "" if self.written else ",".join(self.columns) + "\n"
            self._append(header + self._left)
            self.written, self._left = self.written + 1, ""

    def disturbed(self) -> UserError | None:
        """What to say where something else has removed, replaced, cut or written the file since it was opened."""
        if not self.written or (is_at(self.path, self._file) and os.fstat(self._file.fileno()).st_size == self._size):
            return None
        return UserError(
            f"{self.path} was removed, replaced or changed by something else while it was written: "
            f"its {self.written} rows are not all there; give --overwrite to begin anew"
        )

    def _behind(self, more: Mapping[str, Sequence[Value]] | Sequence[Value], rows: int) -> list[str]:
        """What each of these ``rows`` ends with: the cells of the further columns, a comma before each."""
        if not self._further and not more:
            return [""] * rows
        if not isinstance(more, Mapping):
            more = {name: [value] * rows for name, value in zip(self._further, more, strict=True)}
        unknown = sorted(set(more) - set(self._further))
        if unknown:
            raise ValueError(f"{self.path} has no column {', '.join(unknown)}")
        none = [None] * rows
        columns = [[_cell(value) for value in more.get(name, none)] for name in self._further]
        return ["".join(f",{cell}" for cell in cells) for cells in zip(*columns, strict=True)]

    def _append(self, text: str) -> None:
        data = text.encode()
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) or 0 :]
        except OSError as error:
            self._file.truncate(self._size)
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; the {self.written} complete rows are kept, make "
                "room and go on with --resume"
            ) from error
        self._size += len(data)

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean NLL so far."""
        return perplexity(self.mean_nll)

    @property
    def mean_nll(self) -> float:
        """Mean of all NLLs so far, in float64."""
        return self.nll_sum / self.rows if self.rows else math.nan

    def close(self) -> None:
        """Close the file; one that never got a row goes, with the folders made for it, unless it is an older result."""
        if not self.rows and not self.replaces:
            with suppress(OSError):  # an empty file does no harm
                self.path.unlink()
            remove_empty(self._made)
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):  # first, as most are
        return float.__repr__(value)
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _open(path: Path, replacing: bool) -> tuple[FileIO, list[Path]]:
    """The file, locked, and the folders that were made for it."""
    made, file = _found(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise UserError(f"another process is writing {path}: wait for it, or give another --output-dir") from error
    if not is_at(path, file):  # whoever held the lock has removed or replaced it meanwhile
        file.close()
        file, more = _open(path, replacing)
        return file, made + more
    if file.tell() and not replacing:
        file.close()
        raise UserError(
            f"{path} already exists: give --overwrite to replace it, --resume to go on, or another --output-dir"
        )
    return file, made


def _found(path: Path) -> tuple[list[Path], FileIO]:
    """The folders that were made for a file, and the file."""
    for left in reversed(range(TRIES)):
        made: list[Path] = []
        try:
            made = make_folder(path.parent)
            file = FileIO(path, "ab", opener=_opened)  # unbuffered: a row is with the operating system once written
            return made, file
        except OSError as error:
            remove_empty(made)
            if left and isinstance(error, FileNotFoundError) and not path.parent.is_dir():
                continue  # another process had made the folder, and has just removed it
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    raise AssertionError


def _opened(path: str, flags: int) -> int:
    """As ``os.open``, of a file; a pipe is not waited for."""
    if is_special(Path(path)):
        raise OSError(SPECIAL)
    number = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if stat.S_ISREG(os.fstat(number).st_mode):
        return number
    os.close(number)
    raise OSError(SPECIAL)


@undisturbed()
def put(path: Path, data: bytes) -> None:
    """Write the whole of a CSV file at once, or nothing, unless another process is writing it."""
    file, _ = _open(path, replacing=True)
    with file:
        replace_file(path, data, ready=lambda: trace_of(path).unlink(missing_ok=True))  # a trace of other rows
