"""Result files, read back: our own CSVs, those of the scripts that sinkbench replaces, and the records beside them."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbench.errors import UserError
from sinkbench.files import read_bytes
from sinkbench.results.columns import SEED_COLUMNS, known_columns
from sinkbench.results.record import read_record
from sinkbench.results.rows import Damage, header_of, parse
from sinkbench.results.run import GENERATE, Run, place_of, strategy_of
from sinkbench.signals import check

if TYPE_CHECKING:
    import pandas as pd


def read_runs(folder: Path) -> dict[str, Run]:
    """Every CSV in ``folder`` as a run by its name, those of a strategy together.

    Where all of them were written by ``sinkbench generate``, a strategy goes by its own name too. A record that cannot
    be read counts as none.

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
    runs = [read_run(path, path.stem.removeprefix(prefix)) for path in sorted(paths)]
    return {run.name: run for run in sorted(runs, key=lambda run: place_of(run.name, run.strategy))}


def read_run(path: Path, name: str | None = None) -> Run:
    """The run of one CSV, and of the record beside it if that can be read.

    Raises:
        UserError: as :func:`read_csv`.
    """
    record: dict[str, Any] | None = None
    with suppress(UserError):  # rows need none
        record = read_record(path.with_suffix(".json"))
    return Run(name or path.stem, strategy_of(path.stem, record), read_csv(path), record or {}, path)


def run_at(path: Path) -> Run:
    """As :func:`read_run`, also where there are no rows yet: of a run that ended before its first one.

    Raises:
        UserError: as :func:`read_csv`.
    """
    if path.is_file() and path.stat().st_size:
        return read_run(path)
    import pandas as pd

    record: dict[str, Any] = {}
    with suppress(UserError):
        record = read_record(path.with_suffix(".json")) or {}
    nothing = pd.DataFrame(columns=known_columns(), dtype=float)
    return Run(path.stem, strategy_of(path.stem, record), nothing, record, path)


def read_csv(path: Path) -> "pd.DataFrame":
    """The rows of one result: all known columns as float64, NaN where the file has none.

    A last line that was cut is left out: runs may be killed at any moment.

    Raises:
        UserError: one line that says what is wrong with the file, and where.
    """
    check()
    try:
        data = read_bytes(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = header_of(data)
        missing = [name for name in SEED_COLUMNS if name not in header]
        if header and missing:
            raise UserError(f"{path} is not a result: it has no column {', '.join(missing)}; move it out of the folder")
        if not header and b"\n" in data:
            raise UserError(f"{path} is not a result: its first line is empty; move it out of the folder")
        rows = parse(data, known_columns())
    except Damage as error:
        comma = ", " if error.line else " "
        raise UserError(
            f"{path}{comma}{error}: run that experiment again (with --overwrite), or remove the file"
        ) from error
    if not len(rows):
        raise UserError(f"{path} has no rows: run that experiment again (with --overwrite), or remove the file")
    return rows.frame.reindex(columns=known_columns())
