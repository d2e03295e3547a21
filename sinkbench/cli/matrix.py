"""The cells of a sweep as a table: estimated beforehand, live while they run, and at the end."""

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sinkbench.cli.output import Document, Format, show
from sinkbench.config import RunConfig
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError
from sinkbench.library.progress import outcome
from sinkbench.results.table import Column
from sinkbench.results.table import Table as ValueTable
from sinkbench.runs.result import RunResult
from sinkbench.signals import check
from sinkbench.sweeps.device import device_for
from sinkbench.sweeps.estimate import estimate
from sinkbench.sweeps.experiment import Experiments
from sinkbench.sweeps.plan import Cell, once

LAID_OUT = 500  # rows of estimates up to which the table is laid out for the terminal: it takes a second for 2,000
ESTIMATED = [
    Column("run", "run"),
    Column("model", "model"),
    Column("dtype", "dtype"),
    Column("tokens", "tokens", ",.0f"),
    Column("memory_bytes", "memory (GiB)", ",.2f", 2.0**-30),
    Column("seconds", "time (s)", ",.0f"),
]


def estimates(read: Experiments, cells: Sequence[RunConfig], form: Format = Format.text) -> None:
    """Print the matrix with an estimate of memory and time each, and of the whole."""
    rows: list[list[Any]] = []
    notes, shape_of = {}, once(read.shape)
    device_of = once(lambda model: device_for(model, shape_of(model)))
    for cell in cells:
        check()
        memory = seconds = None
        try:
            model = cell.model
            device = device_of(model)
            cost = estimate(cell, shape_of(model), device)
            memory, seconds = cost.vram_bytes, cost.seconds
            if cost.vram_bytes > device.memory:
                notes[cell.model_name_or_path] = (
                    f"{cell.model_name_or_path} needs more than the {device.memory / 2**30:.1f} GiB that are free here"
                )
        except Exception as error:  # of one model, which the others do not wait for
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            notes[cell.model_name_or_path] = f"no estimate for {cell.model_name_or_path}: {kind}{error}"
        name = _name(cell, read.options.output_dir)
        rows.append([name, cell.model_name_or_path, cell.dtype, cell.num_tokens, memory, seconds])
    whole = sum(row[-1] or 0.0 for row in rows)
    about = f"About {duration(whole)} on this device, one after the other. Results go to {read.options.output_dir}."
    title = f"{read.path}: {len(cells)} run{'s' if len(cells) != 1 else ''}"
    lines = [about, *(f"note: {note}" for note in notes.values())]
    facts = {"file": str(read.path), "output_dir": str(read.options.output_dir), "seconds": whole}
    table = ValueTable("cells", title, ESTIMATED, rows)
    show(Document([table], facts, lines), form, lambda: _print_estimates(title, rows, lines))


def _print_estimates(title: str, rows: Sequence[Sequence[Any]], notes: Sequence[str]) -> None:
    """The matrix for people."""
    shown = [
        (
            *row[:3],
            f"{row[3]:,}",
            "-" if row[4] is None else f"{row[4] / 2**30:.2f} GiB",
            "-" if row[5] is None else duration(row[5]),
        )
        for row in rows
    ]
    console = Console()
    if len(shown) <= LAID_OUT:
        console.print(_estimate_table(title, shown))
    else:
        typer.echo("\n".join([title, *_in_columns([("run", "model", "dtype", "tokens", "memory", "time"), *shown])]))
    for note in notes:
        console.print(Text(note))


def _estimate_table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, caption_justify="left")
    for column in ("run", "model", "dtype"):
        table.add_column(column, overflow="fold")
    for column in ("tokens", "memory", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _in_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A line a row, the first three columns to the left; none is wrapped."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shape = "  ".join(f"{{:{'<' if place < 3 else '>'}{width}}}" for place, width in enumerate(widths))
    return [shape.format(*row) for row in rows]


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
        self.said: set[tuple[int, str]] = set()

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
            self._say(self._index(cell), note)
        self._line(cell)
        self._draw()

    def watch(self, index: int, steps: Steps, result: RunResult) -> None:
        """Take note of a row of the cell that runs; the launcher runs one at a time."""
        for key in self.running:
            self.running[key] = result
        if time.monotonic() - self.drawn > 0.3:
            self._draw()

    def note(self, line: str) -> None:
        """Say a line about the cell that runs; the launcher runs one at a time."""
        for index in self.running:
            self._say(index, line)

    def _say(self, index: int, line: str) -> None:
        if (index, line) not in self.said:
            self.said.add((index, line))
            self.console.print(Text(f"{_name(self.cells[index].options, self.folder)}: {line}"), soft_wrap=True)

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
