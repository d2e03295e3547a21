"""``sinkbench sweep``: all runs of an experiment file."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer


class Launcher(StrEnum):
    """Where cells run."""

    local = "local"
    ray = "ray"


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An experiment file, such as experiments/*.toml.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs, with estimates of memory and time.")
    ] = False,
    output_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go, instead of where the file says.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, metavar="N", help="Further tries of a run that failed.")] = 1,
    launcher: Annotated[
        Launcher, typer.Option(metavar="NAME", help="local, or ray: as tasks on a Ray cluster.")
    ] = Launcher.local,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Run again what is finished.")] = False,
) -> None:
    """Run every combination that an experiment file lists.

    What is finished is skipped; what was interrupted goes on at its last row.

    Out of memory is a result. A run that fails is tried again, and the sweep goes on.

    The exit status is 1 if a run failed in the end.
    """
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.cli.matrix import Board, estimates
    from sinkbench.sweeps import experiment as experiments
    from sinkbench.sweeps import plan as sweeps

    read = experiments.read(file)
    if output_dir is not None:
        read = replace(read, options=read.options.model_copy(update={"output_dir": str(output_dir)}))
    cells = [replace(cell, overwrite=overwrite or cell.overwrite) for cell in read.cells()]
    if dry_run:
        estimates(read, cells)
        return
    with Board(read.options.output_dir) as board:
        plan = sweeps.planned(cells, Path(read.options.output_dir))
        board.show(plan)
        sweeps.sweep(plan, _launch(launcher, board.watch), retries, board.started, board.finished)
    board.close()
    if any(cell.result is not None and cell.result.interrupted for cell in plan):
        raise typer.Exit(130)
    if any(cell.failed for cell in plan):
        raise typer.Exit(1)


def _launch(launcher: Launcher, watch: Callable) -> Callable:
    if launcher is Launcher.ray:
        from sinkbench.sweeps.launchers.ray import launch as on_ray

        return on_ray
    from sinkbench.sweeps.launchers.local import launch

    return partial(launch, watch=watch)
