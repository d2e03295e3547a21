"""The rows of a result file: bytes to numbers, or the line of the first damage.

A file ends where its process was when it was killed: behind the last line break may be the beginning of a row, perhaps
cut inside its last number. So a row is complete where its line break is there, and only complete rows count.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

MARK = b"\xef\xbb\xbf"  # what some editors put before UTF-8
PERPLEXITIES = ("ppl", "overall_ppl")  # whose logarithms are taken
LONGEST = 10**9  # tokens
LARGEST = 1e150  # of any other measure: sums and squares of it are numbers still
BREAK, COMMA = ord("\n"), ord(",")


class Damage(Exception):
    """What is wrong with the bytes of a file, and in which line (from 1); ``None`` where it is not one line."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what if line is None else f"line {line}, {what}")
        self.what, self.line = what, line


@dataclass(frozen=True)
class Rows:
    """Complete rows.

    Attributes:
        frame: float64 by column, NaN where a cell is empty, one row a line.
        size: bytes up to the end of the last complete row.
    """

    frame: "pd.DataFrame"
    size: int

    def __len__(self) -> int:
        return len(self.frame)


def header_of(data: bytes) -> list[str]:
    """The columns of a file; none where not even its header was written to the end.

    Raises:
        Damage: it is not text.
    """
    line, ended, _ = data.removeprefix(MARK).partition(b"\n")
    try:
        names = [name.strip() for name in line.decode().split(",")]
    except UnicodeDecodeError as error:
        raise Damage("is not a text file") from error
    return names if line.strip() and ended else []


def parse(data: bytes, columns: Sequence[str]) -> Rows:
    """Those of ``columns`` that the file has, of all complete rows.

    Line breaks may be those of Windows, and the file may begin with a byte order mark. Blank lines at the end, and a
    last row with too few cells, do not count.

    Raises:
        Damage: it is not text; a column is there twice; a row has too few or too many cells, or one that is no number.
    """
    header = header_of(data)
    wanted = [name for name in columns if name in header]
    double = sorted(name for name in wanted if header.count(name) > 1)
    if double:
        raise Damage(f"has the column {double[0]} twice", 1)
    size = _end_of_rows(data, len(header) - 1)
    return Rows(_numbers(data[:size].removeprefix(MARK), header, wanted), size)


def starts_of(frame: "pd.DataFrame") -> np.ndarray:
    """The indices of the rows with which streams begin; of a file without documents, that of the first row."""
    if not len(frame):
        return np.empty(0, int)
    streams = frame["stream"].to_numpy() if "stream" in frame else np.full(len(frame), np.nan)
    begins = (streams[1:] != streams[:-1]) & ~(np.isnan(streams[1:]) & np.isnan(streams[:-1]))
    return np.concatenate(([0], np.flatnonzero(begins) + 1))


def predictions_in(frame: "pd.DataFrame") -> int:
    """How many tokens were predicted up to the last row, those of rows that were not written among them."""
    if frame.empty:
        return 0
    ends = np.append(starts_of(frame)[1:], len(frame)) - 1
    return int(frame["input_length"].to_numpy()[ends].sum())


def is_whole(frame: "pd.DataFrame", every: int = 1) -> bool:
    """Whether these are the first rows of a run: every so many-th of each stream and its last, stream after stream."""
    starts = starts_of(frame)
    ends = np.append(starts[1:], len(frame)) - 1
    lengths = frame["input_length"].to_numpy()
    within = np.arange(len(frame)) - np.repeat(starts, ends - starts + 1)
    due, last = (within + 1) * every, np.isin(np.arange(len(frame)), ends)
    right = (lengths == due) | (last & (lengths < due) & (lengths > due - every))
    numbered = "stream" not in frame or np.array_equal(frame["stream"].to_numpy()[starts], np.arange(len(starts)))
    return bool(right.all() and numbered)


def complete_rows_in(path: Path) -> int:
    """How many complete rows a file has, by its line breaks alone; 0 where it cannot be read."""
    try:
        with path.open("rb") as file:
            return max(0, sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) - 1)
    except OSError:
        return 0


def _end_of_rows(data: bytes, commas: int) -> int:
    """Bytes up to the end of the last complete row, each of whose lines has so many ``commas``."""
    text = np.frombuffer(data, np.uint8)
    breaks = np.flatnonzero(text == BREAK)
    before = np.searchsorted(np.flatnonzero(text == COMMA), breaks)
    counts = np.diff(before, prepend=0)
    ends = len(breaks)
    while ends > 1 and not data[breaks[ends - 2] + 1 : breaks[ends - 1]].strip():
        ends -= 1  # a blank line
    if ends > 1 and counts[ends - 1] < commas:
        ends -= 1  # what was cut, and ended by whatever wrote behind it
    wrong = np.flatnonzero(counts[:ends] != commas)
    if len(wrong):
        count = counts[wrong[0]] + 1
        raise Damage(f"has {count} value{'s' if count > 1 else ''}, not {commas + 1}", int(wrong[0]) + 1)
    return int(breaks[ends - 1]) + 1 if ends else 0


def _numbers(data: bytes, header: list[str], wanted: list[str]) -> "pd.DataFrame":
    import pandas as pd

    body = data.partition(b"\n")[2]
    if not body:
        return pd.DataFrame(columns=wanted, dtype=float)
    places = [header.index(name) for name in wanted]
    names = list(range(len(header)))  # columns that are not read may share a name
    try:
        # no dtype: asked for floats, pandas would take True for 1; low_memory would decide piece by piece
        frame = pd.read_csv(
            BytesIO(body),
            names=names,
            header=None,
            usecols=places,
            quoting=csv.QUOTE_NONE,
            skip_blank_lines=False,
            low_memory=False,
        )[places].set_axis(wanted, axis=1)
    except ValueError as error:
        raise _first_that_is_no_number(body, header, wanted) or Damage(f"cannot be read ({error})") from error
    if any(kind.kind not in "iuf" for kind in frame.dtypes):
        raise _first_that_is_no_number(body, header, wanted) or Damage("holds numbers that cannot be read")
    frame = frame.astype("float64")
    for name in wanted:
        outside = np.flatnonzero(_is_outside(name, frame[name].to_numpy()))
        if len(outside):
            row = int(outside[0])
            raise Damage(f"has {frame[name][row]:g} as its {name}, which no run measured", row + 2)
    lengths = frame["input_length"] if "input_length" in wanted else pd.Series(dtype=float)
    unknown = np.flatnonzero(~np.isfinite(lengths))
    if len(unknown):
        row = int(unknown[0])
        cell = body.split(b"\n")[row].split(b",")[header.index("input_length")]
        raise _no_number(cell, "input_length", row)
    return frame


def _is_outside(name: str, values: np.ndarray) -> np.ndarray:
    """Which of a column's finite values no run can have measured, and nobody could add up or draw."""
    if name in PERPLEXITIES:
        return values <= 0
    size = np.abs(values)
    return np.isfinite(values) & (size > (LONGEST if name == "input_length" else LARGEST))


def _first_that_is_no_number(body: bytes, header: list[str], wanted: list[str]) -> Damage | None:
    places = [(header.index(name), name) for name in wanted]
    for row, line in enumerate(body.split(b"\n")[:-1]):
        cells = line.split(b",")
        for place, name in places:
            if not _is_number(cells[place]):
                return _no_number(cells[place], name, row)
    return None


def _is_number(cell: bytes) -> bool:
    try:
        float(cell.strip() or b"nan")
    except ValueError:
        return False
    return b"_" not in cell  # as Python groups digits


def _no_number(cell: bytes, name: str, row: int) -> Damage:
    text = cell.decode(errors="replace").strip()
    return Damage(f"has {repr(text) if text else 'nothing'} as its {name}, not a number", row + 2)
