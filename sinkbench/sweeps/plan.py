"""A sweep: the cells of an experiment file, known by what determines their results, carried out and on record."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt

from sinkbench.config import ModelSource, RunConfig, Source
from sinkbench.data.stream import Streams, read_streams
from sinkbench.errors import UserError
from sinkbench.models.loading import Checkpoint, load_tokenizer, locate
from sinkbench.results.record import read_record
from sinkbench.results.rows import complete_rows_in
from sinkbench.runs.key import identified, weights_of
from sinkbench.runs.protocol import tokens_for
from sinkbench.runs.record import now, write_json
from sinkbench.runs.result import ENDED, FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.runs.tracing import lacks_trace
from sinkbench.signals import check
from sinkbench.strategies.registry import chosen_by
from sinkbench.validation import checked

RESULTS = (FINISHED, ENDED, OUT_OF_MEMORY)  # how a cell ends that needs no other try


@dataclass
class Cell:
    """One run of a sweep.

    Attributes:
        identity: what determines its result, with ``key``; empty where that cannot be known yet.
        result: how it ended; ``None`` until then.
        skipped: whether ``result`` was there before.
    """

    options: RunConfig
    identity: dict[str, Any]
    result: RunResult | None = None
    skipped: bool = False

    @property
    def failed(self) -> bool:
        return self.result is not None and self.result.exit_reason.startswith("failed")


def planned(
    cells: Sequence[RunConfig],
    folder: Path,
    devices: Collection[str],
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> list[Cell]:
    """Every cell, with the result that ``folder`` already holds of it, under whatever name.

    A result counts where its key is that of the cell, and its device one of ``devices``: what ran out of memory, or
    was slow, elsewhere says nothing of here. A cell whose model or text cannot be had now, for whatever reason, cannot
    be known from others; it is left to its turn, and to its retries. One that lacks a trace has its turn too: where its
    rows lie in their place they stay, and the trace alone is made.

    Args:
        find: looks for a model.

    Raises:
        UserError: the whole result of another device is where that of a cell would go.
    """
    known = finished_in(folder)
    shared = _Shared(find)
    plan = []
    for config in cells:
        check()
        try:
            identity = shared.identity(config)
        except Exception:  # whatever it is: the cell meets it again, and fails alone
            plan.append(Cell(config, {}))
            continue
        there = [] if config.overwrite else known.get(identity["key"], [])
        own = [result for device, result in there if device in devices]
        if not own:
            _check_place(config, there, devices)
        done = [result for result in own if not lacks_trace(config, chosen_by(config), result.csv, result.rows)]
        plan.append(Cell(config, identity, done[-1] if done else None, skipped=bool(done)))
    return plan


def _check_place(config: RunConfig, there: Sequence[tuple[str, RunResult]], devices: Collection[str]) -> None:
    """Refuse a cell whose place holds all that it asks for, from elsewhere; out of memory goes on, as it was cut."""
    for device, result in there:
        if result.csv == config.csv and result.exit_reason != OUT_OF_MEMORY:
            raise UserError(
                f"{config.csv} was measured on {device}, and this is {' or '.join(sorted(devices))}: "
                "give another --output-dir, or --overwrite to measure it here"
            )


class _Shared:
    """Models and texts that several cells share, each looked for once."""

    def __init__(self, find: Callable[[ModelSource], Checkpoint]) -> None:
        self.checkpoint = once(find)
        self.weights = once(lambda source: weights_of(self.checkpoint(source)))
        self.streams = once(self._read)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        streams = self.streams((config.model, config.source, tokens_for(config)))
        return identified(config, chosen_by(config), streams.tokens, self.weights(config.model))

    def _read(self, wanted: tuple[ModelSource, Source, int]) -> Streams:
        model, source, count = wanted
        return read_streams(source, count, lambda: load_tokenizer(self.checkpoint(model)))


def once(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``work`` for cells that share what it works on: done once an argument; an error is raised each time."""
    known: dict[Any, Any] = {}

    def answer(argument: Any) -> Any:
        if argument not in known:
            try:
                known[argument] = work(argument)
            except Exception as error:
                known[argument] = error
        if isinstance(known[argument], Exception):
            raise known[argument]
        return known[argument]

    return answer


def finished_in(folder: Path) -> dict[str, list[tuple[str, RunResult]]]:
    """Results in ``folder`` and below whose rows are all there: by key, the device and the result of each.

    What cannot be read, or does not say what a record says, is no result.
    """
    found: dict[str, list[tuple[str, RunResult]]] = {}
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        check()
        csv = path.with_suffix(".csv")
        if not (path.is_file() and csv.is_file()):  # a pipe would be waited for
            continue
        try:
            record = checked(_Recorded, read_record(path) or {}, str)
        except UserError:
            continue
        result = _result(csv, record)
        written = result.rows if record.rows_written is None else record.rows_written
        if record.exit_reason in RESULTS and complete_rows_in(csv) == written:
            found.setdefault(record.key, []).append((str(record.device), result))
    return found


class _Recorded(BaseModel):
    """What a sweep has to know of a record; further keys do not matter."""

    model_config = ConfigDict(strict=True, allow_inf_nan=True)

    key: str
    exit_reason: str
    device: str | None = None
    experiment: str
    rows: NonNegativeInt
    rows_written: NonNegativeInt | None = None
    overall_ppl: float | None = None
    seconds: NonNegativeFloat | None = None
    median_latency: float | None = None
    peak_vram_gib: float | None = None
    peak_kv_cache_bytes: NonNegativeInt | None = None
    timed_rows: NonNegativeInt | None = None
    rows_not_finite: NonNegativeInt = 0


def _result(csv: Path, record: _Recorded) -> RunResult:
    return RunResult(
        record.experiment,
        csv,
        rows=record.rows,
        overall_ppl=float("nan") if record.overall_ppl is None else record.overall_ppl,
        exit_reason=record.exit_reason,
        seconds=record.seconds or 0.0,
        latency=record.median_latency,
        peak_vram=record.peak_vram_gib,
        kv_cache_bytes=record.peak_kv_cache_bytes or 0,
        not_finite=record.rows_not_finite,
        untimed=max(0, record.rows - (record.rows if record.timed_rows is None else record.timed_rows)),
    )


Launch = Callable[
    [Sequence[RunConfig], int, Callable[[int], None], Callable[[int, RunResult], None]],
    None,
]


def sweep(
    plan: Sequence[Cell],
    launch: Launch,
    retries: int,
    started: Callable[[Cell], None] = lambda cell: None,
    finished: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Carry out what ``plan`` has no result of. Interrupted cells go on where they were broken off."""
    waiting = [cell for cell in plan if cell.result is None]

    def ended(index: int, result: RunResult) -> None:
        cell = waiting[index]
        cell.result = result
        if cell.failed:
            _record_failure(cell)
        finished(cell)

    cells = [cell.options.but(resume=not cell.options.overwrite) for cell in waiting]
    if cells:
        launch(cells, retries, lambda index: started(waiting[index]), ended)


def _record_failure(cell: Cell) -> None:
    """Put a failure on record where no record has it."""
    assert cell.result is not None
    options, path = cell.options, cell.options.csv.with_suffix(".json")
    about = {"experiment": options.experiment, "engine": options.engine, "options": options.model_dump(mode="json")}
    record = {**about, **cell.identity, "ended": now(), "exit_reason": cell.result.exit_reason, "rows": 0}
    with suppress(UserError, OSError):  # where there is no place for it, that is why the cell has failed
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
