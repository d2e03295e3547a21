"""Result files, read back, and what their columns show.

Reads our own CSVs and those of the scripts that sinkbench replaces. To show another feature, add an entry to
:data:`FEATURES`.
"""

from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd

from sinkbench.errors import UserError
from sinkbench.results.columns import GENERATE, GENERATED, OPTIONAL, ORDER, REQUIRED, Values


def read_results(folder: Path) -> dict[str, pd.DataFrame]:
    """Every CSV in ``folder`` by experiment name: the known strategies first, in a fixed order.

    Where all of them were written by ``sinkbench generate``, a strategy goes by its own name too.

    Raises:
        UserError: no such folder, no CSV in it, or one that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: run an experiment first (sinkbench run), or give another --output-dir")
    try:
        # hidden ones are what file managers and editors leave behind
        paths = [path for path in folder.glob("*.csv") if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {error.strerror or error}") from error
    if not paths:
        raise UserError(f"no CSV in {folder}: run an experiment first (sinkbench run), or give another --output-dir")
    prefix = GENERATE if all(path.stem.startswith(GENERATE) for path in paths) else ""
    named = {path.stem.removeprefix(prefix): path for path in paths}
    return {name: _widened(read_csv(named[name])) for name in sorted(named, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def _widened(frame: pd.DataFrame) -> pd.DataFrame:
    """With the columns of generated text, NaN in other results."""
    return frame.reindex(columns=[*REQUIRED, *OPTIONAL, *GENERATED])


def read_csv(path: Path) -> pd.DataFrame:
    """One result file, every column float64, a column the file does not have all NaN.

    A last line that was cut off, as a killed writer may leave it, is not read.

    Raises:
        UserError: the file cannot be read, is empty, or does not hold the columns and numbers of a result.
    """
    lines = _complete_lines(path)
    header = [name.strip() for name in lines[0].split(",")] if lines else []
    missing = [name for name in REQUIRED if name not in header]
    if lines and missing:
        raise UserError(f"{path} is not a result: it has no column {', '.join(missing)}; move it out of the folder")
    if len(lines) < 2:
        raise UserError(f"{path} has no rows: run that experiment again (with --overwrite), or remove the file")
    for number, line in enumerate(lines[1:], start=2):
        if line.count(",") != len(header) - 1:
            raise UserError(_malformed(path, number, f"has {line.count(',') + 1} values, not {len(header)}"))
    try:
        # low_memory would decide the type of a column piece by piece
        frame = pd.read_csv(StringIO("\n".join(lines[1:])), names=header, header=None, low_memory=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is not a CSV that can be read ({error}); run that experiment again") from error
    more = [name for name in GENERATED if name in header]
    return pd.DataFrame({name: _numbers(frame, name, path) for name in (*REQUIRED, *OPTIONAL, *more)})


def _complete_lines(path: Path) -> list[str]:
    """The lines that were written to their end; blank ones at the end of the file do not count."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: run that experiment again, or remove the file") from error
    lines = text.split("\n")
    lines.pop()  # behind the last line break: nothing, or a line that was cut, perhaps inside its last number
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) > 1 and lines[-1].count(",") < lines[0].count(","):
        lines.pop()
    return lines


def _numbers(frame: pd.DataFrame, name: str, path: Path) -> Values:
    """Column ``name`` as float64."""
    if name not in frame:
        return pd.Series(np.nan, index=frame.index)
    column = frame[name]
    values = pd.to_numeric(column, errors="coerce").astype("float64")
    wrong = column.notna() & values.isna()
    if name == "input_length":
        wrong |= ~np.isfinite(values)
    if column.dtype == bool:
        wrong |= True
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        shown = "nothing" if pd.isna(column.iloc[row]) else repr(str(column.iloc[row]))
        raise UserError(_malformed(path, row + 2, f"has {shown} as its {name}, not a number"))
    return values


def _malformed(path: Path, number: int, what: str) -> str:
    return f"{path}, line {number}, {what}: run that experiment again (with --overwrite), or remove the file"
