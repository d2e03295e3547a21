"""The cells of a sweep as a table: estimated beforehand, live while they run, and at the end."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sinkbench.cli.progress import outcome
from sinkbench.config import RunConfig
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError
from sinkbench.runs.result import RunResult
from sinkbench.sweeps.estimate import device_for, estimate
from sinkbench.sweeps.experiment import Experiments
from sinkbench.sweeps.plan import Cell


def estimates(read: Experiments, cells: Sequence[RunConfig]) -> None:
    """Print the matrix with an estimate of memory and time each, and of the whole."""
    title = f"{read.path}: {len(cells)} run{'s' if len(cells) != 1 else ''}"
    table = Table(title=Text(title, style="table.title"), caption_justify="left")
    for column in ("run", "model", "dtype"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    seconds, notes = 0.0, {}
    for cell in cells:
        memory = length = "-"
        try:
            shape = read.shape(cell)
            device = device_for(cell, shape)
            cost = estimate(cell, shape, device)
            memory, length = f"{cost.vram_bytes / 2**30:.2f} GiB", duration(cost.seconds)
            seconds += cost.seconds
            if cost.vram_bytes > device.memory:
                notes[cell.model_name_or_path] = (
                    f"{cell.model_name_or_path} needs more than the {device.memory / 2**30:.1f} GiB that are free here"
                )
        except UserError as error:
            notes[cell.model_name_or_path] = f"no estimate for {cell.model_name_or_path}: {error}"
        name, model = _name(cell, read.options.output_dir), Text(cell.model_name_or_path)
        table.add_row(Text(name), model, cell.dtype, f"{cell.num_tokens:,}", memory, length)
    console = Console()
    console.print(table)
    about = f"About {duration(seconds)} on this device, one after the other. Results go to {read.options.output_dir}."
    console.print(Text(about))
    for note in notes.values():
        console.print(Text(f"note: {note}"))


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _name(options: RunConfig, folder: str) -> str:
    """Where the rows go, as seen from ``folder``, without the suffix."""
    return str(options.csv.relative_to(folder).with_suffix(""))


class Board:
    """The table of a sweep's cells, live on a terminal; elsewhere a line for each cell that has ended."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.console = Console(stderr=True)
        self.cells: Sequence[Cell] = []
        self.running: dict[int, RunResult | None] = {}
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.drawn = 0.0

    def show(self, cells: Sequence[Cell]) -> None:
        """Take note of the cells."""
        self.cells = cells
        for cell in cells:
            if cell.result is not None:
                self._line(cell)
        self._draw()

    def started(self, cell: Cell) -> None:
        self.running[self._index(cell)] = None
        self._draw()

    def finished(self, cell: Cell) -> None:
        self.running.pop(self._index(cell), None)
        for note in cell.result.notes if cell.result is not None else ():
            self.console.print(Text(f"{_name(cell.options, self.folder)}: {note}"), soft_wrap=True)
        self._line(cell)
        self._draw()

    def watch(self, index: int, steps: Steps, result: RunResult) -> None:
        """Take note of a row of the cell that runs; the launcher runs one at a time."""
        for key in self.running:
            self.running[key] = result
        if time.monotonic() - self.drawn > 0.3:
            self._draw()

    def close(self) -> None:
        """The closing table."""
        Console().print(self._table())

    def _index(self, cell: Cell) -> int:
        return next(i for i, other in enumerate(self.cells) if other is cell)

    def _line(self, cell: Cell) -> None:
        if self.live is None and cell.result is not None:
            self.console.print(Text(f"{_name(cell.options, self.folder)}: {_state(cell, None)}"), soft_wrap=True)

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        if self.live is not None:
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(title=Text(self.folder, style="table.title"))
        table.add_column("run", overflow="fold")
        for column in ("tokens", "perplexity", "ms"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("outcome", overflow="fold", min_width=12)
        for index, cell in enumerate(self.cells):
            result = cell.result or self.running.get(index)
            rows, ppl, latency = "", "", ""
            if result is not None and result.rows:
                rows, ppl = f"{result.rows:,}", f"{result.overall_ppl:.3f}"
                latency = "" if result.latency is None else f"{result.latency * 1e3:.2f}"
            state = _state(cell, "running" if index in self.running else "waiting")
            table.add_row(Text(_name(cell.options, self.folder)), rows, ppl, latency, Text(state))
        return table

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()


def _state(cell: Cell, until_then: str | None) -> str:
    if cell.result is None:
        return until_then or "waiting"
    ended = outcome(cell.result, cell.options.num_tokens)
    return f"was there: {ended}" if cell.skipped else ended
