"""``sinkbench.sweep``: all runs of an experiment."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from sinkbench.config import Objects, RunConfig, configured
from sinkbench.errors import UserError
from sinkbench.library.asking import called, plain
from sinkbench.signals import check, handed_on
from sinkbench.validation import Flag, Folder, SizeOrZero, one_of, shown

if TYPE_CHECKING:
    import pandas as pd

    from sinkbench.engines.step import Steps
    from sinkbench.runs.result import RunResult
    from sinkbench.sweeps.experiment import Experiments
    from sinkbench.sweeps.plan import Cell

LAUNCHERS = ("local", "ray")
RETRIES = 1


class Board(Protocol):
    """What takes note of a sweep's cells."""

    def show(self, cells: "Sequence[Cell]") -> None: ...
    def started(self, cell: "Cell") -> None: ...
    def finished(self, cell: "Cell") -> None: ...
    def watch(self, index: int, steps: "Steps", result: "RunResult") -> None: ...
    def note(self, line: str) -> None: ...


class Silence:
    """Takes note of nothing."""

    def show(self, cells: "Sequence[Cell]") -> None:
        """The cells, before the first of them is run."""

    def started(self, cell: "Cell") -> None:
        """A cell whose turn has come."""

    def finished(self, cell: "Cell") -> None:
        """A cell that has ended."""

    def watch(self, index: int, steps: "Steps", result: "RunResult") -> None:
        """A row of the cell that runs."""

    def note(self, line: str) -> None:
        """A line about the cell that runs."""


def sweep(
    file: str | Path | Mapping[str, Any],
    dry_run: bool = False,
    output_dir: str | Path | None = None,
    retries: int = RETRIES,
    launcher: str = "local",
    overwrite: bool = False,
    trace: bool = False,
) -> "pd.DataFrame":
    """As ``sinkbench sweep``: every combination that an experiment lists, where no result is there yet.

    Args:
        file: an experiment file; or what it would say, as a table: ``{"experiment": ["windowed", "h2o"]}``.
        dry_run: whether to estimate memory and time, and run nothing.
        output_dir: where results go, instead of where the file says.
        retries: further tries of a run that failed.
        launcher: ``local``, or ``ray``: as tasks on a Ray cluster.
        overwrite: whether to run again what is finished.
        trace: whether to write traces, also of what is finished and has none.

    Returns:
        A row a run, by the name of its files below ``output_dir``: what it is and how it ended, or with ``dry_run``
        what it will cost. A run that has failed is no error: ``exit_reason`` says why.

    Raises:
        UserError: what is wrong with the experiment, or with an argument.
        KeyboardInterrupt: at Ctrl-C; what is finished stays, and the same call goes on.
    """
    given = {
        **{"dry_run": dry_run, "output_dir": output_dir, "retries": retries, "launcher": launcher},
        **{"overwrite": overwrite, "trace": trace},
    }
    arguments = configured(_Arguments, {name: plain(value) for name, value in given.items()})
    if not isinstance(file, str | Path | Mapping) or not str(file):
        raise UserError(f"an experiment is a file, or a table of what it would say (got {shown(file)})")
    call = called("sweep", {"file": file, **{name: value for name, value in given.items() if value}})
    return handed_on(lambda: _swept(file, arguments, call))


class _Arguments(BaseModel):
    """What :func:`sweep` takes beside the experiment."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dry_run: Flag
    output_dir: Annotated[Folder | None, Field(strict=False)]
    retries: SizeOrZero
    launcher: Annotated[str, one_of(LAUNCHERS)]
    overwrite: Flag
    trace: Flag


def _swept(file: str | Path | Mapping[str, Any], arguments: _Arguments, call: str) -> "pd.DataFrame":
    from sinkbench.sweeps.experiment import experiments, read_experiments

    if isinstance(file, Mapping):
        read = experiments(Path("sweep"), {str(name): _listed(value) for name, value in file.items()})
    else:
        read = read_experiments(Path(file))
    read, cells = cells_of(read, arguments.output_dir, arguments.overwrite, arguments.trace)
    if arguments.dry_run:
        return _costs(read, cells)
    cells = [cell.but(objects=Objects(call=call)) for cell in cells]
    plan = carried_out(read, cells, arguments.retries, arguments.launcher, Silence())
    return _table(plan, Path(read.options.output_dir))


def _listed(value: Any) -> Any:
    return [plain(one) for one in value] if isinstance(value, list | tuple) else plain(value)


def cells_of(
    read: "Experiments", output_dir: Path | None, overwrite: bool, trace: bool
) -> "tuple[Experiments, list[RunConfig]]":
    """An experiment with its results in ``output_dir``, if any, and its runs.

    Raises:
        UserError: a trace is asked for of documents.
    """
    if output_dir is not None:
        read = read.into(output_dir)
    cells = [cell.but(overwrite=overwrite or cell.overwrite, trace=trace or cell.trace) for cell in read.cells()]
    if any(cell.trace and cell.documents for cell in cells):
        raise UserError("--documents and --trace exclude each other: a trace is of one stream")
    return read, cells


def carried_out(
    read: "Experiments", cells: Sequence[RunConfig], retries: int, launcher: str, board: Board
) -> "list[Cell]":
    """The cells of an experiment, each with its result; what is finished is skipped, and the rest is run.

    Raises:
        UserError: the whole result of another device is where that of a cell would go.
    """
    from sinkbench.models.loading import Locator
    from sinkbench.sweeps import plan as sweeps

    find = Locator()
    with _place(launcher) as place:
        plan = sweeps.planned(cells, Path(read.options.output_dir), place.devices(), find)
        board.show(plan)
        watching = {"watch": board.watch, "note": board.note} if launcher == "local" else {}
        launch = partial(place.launch, find=find, **watching)
        sweeps.sweep(plan, launch, retries, board.started, board.finished)
    return plan


@contextmanager
def _place(launcher: str) -> Iterator[ModuleType]:
    """Where cells run: a module that says which devices there are, and launches."""
    if launcher == "ray":
        from sinkbench.sweeps.launchers import ray

        with ray.connected():
            yield ray
    else:
        from sinkbench.sweeps.launchers import local

        yield local


def _about(cell: RunConfig, folder: Path) -> dict[str, Any]:
    """What a run is."""
    return {
        "run": str(cell.csv.relative_to(folder).with_suffix("")),
        "experiment": cell.experiment,
        "model": cell.model_name_or_path,
        "dataset": cell.dataset_name,
        "dtype": cell.dtype,
        "window_size": cell.window_size,
        "num_tokens": cell.num_tokens,
    }


def _table(plan: "Sequence[Cell]", folder: Path) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for cell in plan:
        result = cell.result
        rows.append(
            {
                **_about(cell.options, folder),
                "tokens": result.rows if result else 0,
                "perplexity": result.overall_ppl if result else None,
                "median_latency": result.latency if result else None,
                "peak_kv_cache_bytes": result.kv_cache_bytes if result else None,
                "exit_reason": result.exit_reason if result else "not run",
                "was_there": cell.skipped,
                "path": str(result.csv if result else cell.options.csv),
            }
        )
    return pd.DataFrame(rows).set_index("run")


def _costs(read: "Experiments", cells: Sequence[RunConfig]) -> "pd.DataFrame":
    """What each run will need, in bytes and seconds, and why that is not known where it is not."""
    import pandas as pd

    from sinkbench.sweeps.device import device_for
    from sinkbench.sweeps.estimate import estimate
    from sinkbench.sweeps.plan import once

    rows, shape_of = [], once(read.shape)
    device_of = once(lambda model: device_for(model, shape_of(model)))
    for cell in cells:
        check()
        row = {**_about(cell, Path(read.options.output_dir)), "memory": None, "seconds": None, "note": ""}
        try:
            model = cell.model
            cost = estimate(cell, shape_of(model), device_of(model))
            row |= {"memory": cost.vram_bytes, "seconds": cost.seconds}
        except Exception as error:  # of one model, which the others do not wait for
            row["note"] = " ".join(f"{error}".split())
        rows.append(row)
    return pd.DataFrame(rows).set_index("run")
