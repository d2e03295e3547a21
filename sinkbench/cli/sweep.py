"""``sinkbench sweep``: all runs of an experiment file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.cli.status import status_of
from sinkbench.errors import UserError


class Launcher(StrEnum):
    """Where cells run."""

    local = "local"
    ray = "ray"


def sweep(
    file: Annotated[
        Path, typer.Argument(parser=place, metavar="FILE", help="An experiment file, such as experiments/*.toml.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs, with estimates of memory and time.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(parser=place, metavar="DIR", help="Where results go, instead of where the file says.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Further tries of a run that failed.")] = 1,
    launcher: Annotated[
        Launcher, typer.Option(metavar="NAME", help="local, or ray: as tasks on a Ray cluster.")
    ] = Launcher.local,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is finished.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write traces, also of what is finished and has none (see sinkbench run).")
    ] = False,
) -> None:
    """Run every combination that an experiment file lists.

    What is finished is skipped; what was interrupted goes on at its last row.

    Out of memory is a result. A run that fails is tried again, and the sweep goes on.

    The exit status is 1 if a run failed in the end.
    """
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.cli.matrix import Board, estimates
    from sinkbench.models.loading import Locator
    from sinkbench.sweeps import plan as sweeps
    from sinkbench.sweeps.experiment import read_experiments

    read = read_experiments(file)
    if output_dir is not None:
        read = read.into(output_dir)
    cells = [cell.but(overwrite=overwrite or cell.overwrite, trace=trace or cell.trace) for cell in read.cells()]
    if any(cell.trace and cell.documents for cell in cells):
        raise UserError("--documents and --trace exclude each other: a trace is of one stream")
    if dry_run:
        estimates(read, cells)
        return
    folder, find = Path(read.options.output_dir), Locator()
    with _place(launcher) as place, Board(str(folder)) as board:
        plan = sweeps.planned(cells, folder, place.devices(), find)
        board.show(plan)
        watching = {"watch": board.watch, "note": board.note} if launcher is Launcher.local else {}
        launch = partial(place.launch, find=find, **watching)
        sweeps.sweep(plan, launch, retries, board.started, board.finished)
    board.close()
    ended = [status_of(cell.result.exit_reason) for cell in plan if cell.result is not None]
    status = next(filter(None, ended), int(any(cell.failed for cell in plan)))
    if status:
        raise typer.Exit(status)


@contextmanager
def _place(launcher: Launcher) -> Iterator[ModuleType]:
    """Where cells run: a module that says which devices there are, and launches."""
    if launcher is Launcher.ray:
        from sinkbench.sweeps.launchers import ray

        with ray.connected():
            yield ray
    else:
        from sinkbench.sweeps.launchers import local

        yield local
