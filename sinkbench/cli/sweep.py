"""``sinkbench sweep``: all runs of an experiment file."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sinkbench.cli.options import place
from sinkbench.cli.output import Format, FormatOption
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
    form: FormatOption = Format.text,
) -> None:
    """Run every combination that an experiment file lists.

    What is finished is skipped; what was interrupted goes on at its last row.

    Out of memory is a result. A run that fails is tried again, and the sweep goes on.

    The exit status is 1 if a run failed in the end.
    """
    warnings.filterwarnings("ignore", module="transformers|torch")
    if form is not Format.text and not dry_run:
        raise UserError("--format needs --dry-run: what a sweep finds is read with sinkbench compare --format")
    from sinkbench.cli.matrix import Board, estimates
    from sinkbench.library.sweeping import carried_out, cells_of
    from sinkbench.sweeps.experiment import read_experiments

    read, cells = cells_of(read_experiments(file), output_dir, overwrite, trace)
    if dry_run:
        estimates(read, cells, form)
        return
    with Board(str(read.options.output_dir)) as board:
        plan = carried_out(read, cells, retries, launcher.value, board)
    board.close()
    ended = [status_of(cell.result.exit_reason) for cell in plan if cell.result is not None]
    status = next(filter(None, ended), int(any(cell.failed for cell in plan)))
    if status:
        raise typer.Exit(status)
