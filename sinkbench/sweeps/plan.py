"""A sweep: the cells of an experiment file, known by what determines their results, carried out and on record."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkbench.config import ModelSource, RunConfig, Source
from sinkbench.data.stream import Stream, read_stream
from sinkbench.errors import UserError
from sinkbench.files import read_json
from sinkbench.models.loading import Checkpoint, load_tokenizer, locate
from sinkbench.results.rows import complete_rows_in
from sinkbench.runs.key import identified, weights_of
from sinkbench.runs.record import now, write_json
from sinkbench.runs.result import ENDED, FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.strategies.registry import chosen_by

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
    was slow, elsewhere says nothing of here. A cell whose model or text cannot be had now cannot be known from others;
    it is left to its turn, and to its retries.

    Args:
        find: looks for a model.

    Raises:
        UserError: the whole result of another device is where that of a cell would go.
    """
    known = finished_in(folder)
    shared = _Shared(find)
    plan = []
    for config in cells:
        try:
            identity = shared.identity(config)
        except UserError:
            plan.append(Cell(config, {}))
            continue
        there = [] if config.overwrite else known.get(identity["key"], [])
        own = [result for device, result in there if device in devices]
        if not own:
            _check_place(config, there, devices)
        plan.append(Cell(config, identity, own[-1] if own else None, skipped=bool(own)))
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
    """Models and texts that several cells share, each looked for once; an error is raised each time."""

    def __init__(self, find: Callable[[ModelSource], Checkpoint]) -> None:
        self.checkpoint = _once(find)
        self.weights = _once(lambda source: weights_of(self.checkpoint(source)))
        self.stream = _once(self._read)

    def identity(self, config: RunConfig) -> dict[str, Any]:
        stream = self.stream((config.model, config.source, config.num_tokens))
        return identified(config, chosen_by(config), stream.tokens, self.weights(config.model))

    def _read(self, wanted: tuple[ModelSource, Source, int]) -> Stream:
        model, source, count = wanted
        return read_stream(source, count + 1, lambda: load_tokenizer(self.checkpoint(model)))


def _once(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[Any, Any] = {}

    def answer(argument: Any) -> Any:
        if argument not in known:
            try:
                known[argument] = work(argument)
            except UserError as error:
                known[argument] = error
        if isinstance(known[argument], UserError):
            raise known[argument]
        return known[argument]

    return answer


def finished_in(folder: Path) -> dict[str, list[tuple[str, RunResult]]]:
    """Results in ``folder`` and below whose rows are all there: by key, the device and the result of each."""
    found: dict[str, list[tuple[str, RunResult]]] = {}
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        try:
            record = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("exit_reason") in RESULTS and isinstance(record.get("key"), str):
            result = _result(path.with_suffix(".csv"), record)
            if complete_rows_in(result.csv) == result.rows:
                found.setdefault(record["key"], []).append((str(record.get("device")), result))
    return found


def _result(csv: Path, record: dict[str, Any]) -> RunResult:
    ppl = record.get("overall_ppl")
    return RunResult(
        record.get("experiment", csv.stem),
        csv,
        rows=record.get("rows") or 0,
        overall_ppl=float("nan") if ppl is None else ppl,
        exit_reason=record["exit_reason"],
        seconds=record.get("seconds") or 0.0,
        latency=record.get("median_latency"),
        peak_vram=record.get("peak_vram_gib"),
        kv_cache_bytes=record.get("peak_kv_cache_bytes") or 0,
        untimed=max(0, (record.get("rows") or 0) - (record.get("timed_rows", record.get("rows")) or 0)),
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
    path = cell.options.csv.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = cell.options
        about = {"experiment": options.experiment, "engine": options.engine, "options": options.model_dump(mode="json")}
        write_json(path, {**about, **cell.identity, "ended": now(), "exit_reason": cell.result.exit_reason, "rows": 0})
