"""Folders of results, found and read: each folder that holds runs is a group of runs to compare."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sinkbench.errors import UserError
from sinkbench.results.columns import known_columns, measured_by
from sinkbench.results.reading import read_csv
from sinkbench.results.record import read_record
from sinkbench.results.run import GENERATE, Run, place_of, strategy_of


@dataclass(frozen=True)
class Group:
    """The runs of one folder.

    Attributes:
        title: the folder as it was given.
        runs: those of a strategy together.
        unreadable: what could not be read, one line each.
    """

    title: str
    runs: list[Run]
    unreadable: list[str] = field(default_factory=list)

    @property
    def generated(self) -> bool:
        """Whether each run read a text that it wrote itself."""
        columns = list(measured_by("generate"))
        return any(
            run.recorded("prompt_tokens") is not None or run.frame[columns].notna().any(axis=None) for run in self.runs
        )


def collect(folders: Sequence[Path]) -> list[Group]:
    """The groups in ``folders`` and in all folders below.

    Raises:
        UserError: a folder that is not there, or in which there is no result.
    """
    groups: dict[Path, Group] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: give folders that sinkbench run or sinkbench sweep wrote")
        found = {place.resolve(): _group(place) for place in _places(folder)}
        if not any(group.runs for group in found.values()):
            why = next((f" ({line})" for group in found.values() for line in group.unreadable), "")
            raise UserError(f"no result in {folder}{why}: run an experiment first (sinkbench run), or give another")
        for place, group in found.items():
            groups.setdefault(place, group)
    return [group for group in groups.values() if group.runs or group.unreadable]


def _places(folder: Path) -> Iterator[Path]:
    """``folder`` and all folders below that are not hidden, sorted."""
    for parent, below, _ in os.walk(folder):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(parent)


def _group(folder: Path) -> Group:
    """The runs whose files lie in ``folder`` itself."""
    paths = [path for path in folder.iterdir() if path.suffix in (".csv", ".json") and not path.name.startswith(".")]
    runs: list[Run] = []
    unreadable: list[str] = []
    for stem in sorted({path.stem for path in paths}):
        run = _run(folder / f"{stem}.csv", folder / f"{stem}.json", unreadable)
        runs += [run] if run else []
    if all(run.name.startswith(GENERATE) for run in runs):
        runs = [replace(run, name=run.name.removeprefix(GENERATE)) for run in runs]
    return Group(str(folder), sorted(runs, key=lambda run: place_of(run.name, run.strategy)), unreadable)


def _run(csv: Path, beside: Path, unreadable: list[str]) -> Run | None:
    """The run of two files of which one may be missing; ``None`` where what there is does not speak of a run.

    What cannot be read is noted in ``unreadable``, and counts as missing.
    """
    frame: pd.DataFrame | None = None
    record: dict[str, Any] | None = None
    try:
        record = read_record(beside) if beside.exists() else None
    except UserError as error:  # rows need none
        unreadable.append(str(error))
    try:
        frame = read_csv(csv) if csv.exists() else None
    except UserError as error:
        unreadable.append(str(error))
    if frame is None and not (record and "experiment" in record and "exit_reason" in record):
        return None
    if frame is None:
        frame = pd.DataFrame(columns=known_columns(), dtype=float)
    return Run(csv.stem, strategy_of(csv.stem, record), frame, record or {})
