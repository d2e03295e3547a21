"""Folders of results, found and read: each folder that holds runs is a group of runs to compare."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from sinkbench.errors import UserError
from sinkbench.results.columns import GENERATE, GENERATED, OPTIONAL, ORDER, REQUIRED
from sinkbench.results.reading import read_csv

COLUMNS = [*REQUIRED, *OPTIONAL, *GENERATED]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: unique in its group.
        strategy: what it kept, which decides its colour.
        frame: its rows, with the columns of a result file and ``token``, NaN where the file has none; no row where
            the run failed before its first.
        record: its JSON, empty where there is none.
    """

    name: str
    strategy: str
    frame: pd.DataFrame
    record: dict[str, Any] = field(default_factory=dict)

    def told(self, *keys: str) -> Any:
        """What the record says under ``keys``; ``None`` where it says nothing."""
        value: Any = self.record
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *keys: str) -> float | None:
        """The number that the record says under ``keys``; ``None`` where there is no finite number."""
        value = self.told(*keys)
        known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if known else None

    @property
    def length(self) -> int:
        """Tokens read, by its last row."""
        return int(self.frame["input_length"].iloc[-1]) if len(self.frame) else 0

    @property
    def spacing(self) -> int:
        """Tokens from one row to the next; more than 1 where rows were left out to keep the file small."""
        steps = self.frame["input_length"].diff().dropna()
        # a single row may be the first of a thinned file
        return max(1, int(steps.mode().iloc[0]) if len(steps) else self.length)


@dataclass(frozen=True)
class Group:
    """The runs of one folder.

    Attributes:
        title: the folder as it was given.
        runs: the known strategies first.
        unreadable: what could not be read, one line each.
    """

    title: str
    runs: list[Run]
    unreadable: list[str] = field(default_factory=list)

    @property
    def generated(self) -> bool:
        """Whether each run read a text that it wrote itself."""
        return any(run.frame["fresh_nll"].notna().any() or run.told("prompt_tokens") is not None for run in self.runs)


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
    return Group(str(folder), sorted(runs, key=_place), unreadable)


def _run(csv: Path, beside: Path, unreadable: list[str]) -> Run | None:
    """The run of two files of which one may be missing; ``None`` where what there is does not tell of a run.

    What cannot be read is noted in ``unreadable``, and counts as missing.
    """
    frame, record = None, None
    try:
        record = _record(beside) if beside.exists() else None
        frame = read_csv(csv).reindex(columns=COLUMNS) if csv.exists() else None
    except UserError as error:
        unreadable.append(str(error))
    if frame is None and not (record and "experiment" in record and "exit_reason" in record):
        return None
    if frame is None:
        frame = pd.DataFrame(columns=COLUMNS, dtype=float)
    strategy = record.get("experiment") if record else None
    if not isinstance(strategy, str):
        strategy = re.split(r"[-.]", csv.stem.removeprefix(GENERATE))[0]
    return Run(csv.stem, strategy, frame, record or {})


def _record(path: Path) -> dict[str, Any] | None:
    """A run's JSON; ``None`` where it is something else.

    Raises:
        UserError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run that experiment again, or remove the file") from error
    return record if isinstance(record, dict) else None


def _place(run: Run) -> tuple[int, str, list[tuple[int, str]]]:
    """Known strategies first; within one, numbers in a name by their size."""
    known = ORDER.index(run.strategy) if run.strategy in ORDER else len(ORDER)
    parts = re.split(r"(\d+)", run.name)
    return known, run.strategy, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
