"""``sinkbench.read``: what runs have written, as frames."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkbench.errors import UserError
from sinkbench.results.collection import Runs
from sinkbench.results.naming import distinguishing_names
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
    """Runs that are at hand, or in files and folders, by names as short as tells them apart; each is there once.

    Raises:
        UserError: as :func:`read`.
    """
    found: dict[Path, Run] = {}
    for place in _each(places):
        for path, run in _at(place):
            key, number = path.resolve(), 2
            while isinstance(place, Run) and found.get(key, run) is not run:  # another run that was written there
                key, number = path.resolve().with_name(f"{path.name} ({number})"), number + 1
            found.setdefault(key, run)
    names = distinguishing_names(list(found))
    return Runs({name: replace(run, name=name) for name, run in zip(names, found.values(), strict=True)})


def _each(places: Iterable[Any]) -> Iterator[Any]:
    """Every place by itself, however they are put together."""
    for place in places:
        if isinstance(place, Mapping):
            yield from _each(place.values())
        elif isinstance(place, list | tuple):
            yield from _each(place)
        else:
            yield place


def _at(place: Any) -> list[tuple[Path, Run]]:
    """The runs of one place, each with the path that names it."""
    if isinstance(place, Run):
        return [((place.path.parent if place.path else Path()) / place.name, place)]
    if not isinstance(place, str | Path) or not str(place):
        raise UserError(f"a run is a CSV file, a folder of them, or what sinkbench.run has returned (got {place!r})")
    path = Path(place)
    held = read_runs(path).values() if path.is_dir() else [read_run(path)]
    return [((path if path.is_dir() else path.parent) / run.name, run) for run in held]
