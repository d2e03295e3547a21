"""``sinkbench.read``: what runs have written, as frames."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkbench.errors import UserError
from sinkbench.results.collection import Runs
from sinkbench.results.reading import read_run, read_runs
from sinkbench.results.run import Run


def read(*places: Any) -> Run | Runs:
    """What runs have written.

    Args:
        places: CSV files of runs, or folders of them; by default the folder ``results``.

    Returns:
        Of one file, its run: ``frame`` is its rows, ``record`` what is on record of it. Of a folder, or several places,
        runs by name, whose ``frame`` has all rows, and whose ``summary`` a row a run.

    Raises:
        UserError: nothing there, or what cannot be read.
    """
    places = places or ("results",)
    found = runs_of(places)
    single = len(places) == 1 and isinstance(places[0], str | Path) and not Path(places[0]).is_dir()
    return next(iter(found.values())) if single else found


def runs_of(places: Sequence[Any]) -> Runs:
    """Runs that are at hand, or in files and folders, by names that tell them apart.

    Raises:
        UserError: as :func:`read`.
    """
    found: list[tuple[Path, Run]] = []
    for place in dict.fromkeys(places) if all(isinstance(place, str | Path) for place in places) else places:
        found += _at(place)
    names = _names([place for place, _ in found])
    return Runs({name: replace(run, name=name) for name, (_, run) in zip(names, found, strict=True)})


def _at(place: Any) -> list[tuple[Path, Run]]:
    """The runs of one place, each with the path that names it."""
    if isinstance(place, Run):
        return [((place.path.parent if place.path else Path()) / place.name, place)]
    if isinstance(place, Mapping):
        return [one for run in place.values() for one in _at(run)]
    if isinstance(place, list | tuple):
        return [one for each in place for one in _at(each)]
    if not isinstance(place, str | Path) or not str(place):
        raise UserError(f"a run is a CSV file, a folder of them, or what sinkbench.run has returned (got {place!r})")
    path = Path(place)
    held = read_runs(path).values() if path.is_dir() else [read_run(path)]
    return [((path if path.is_dir() else path.parent) / run.name, run) for run in held]


def _names(places: Sequence[Path]) -> list[str]:
    """Runs by their files' names, or their folders', or both, or their paths: the first that is different for all."""
    candidates = [
        [place.name for place in places],
        [place.parent.name for place in places],
        [f"{place.parent.name}/{place.name}" for place in places],
        [str(place) for place in places],
    ]
    return next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])
