"""A sweep: the cells of an experiment file, told apart by what determines their results, carried out and on record."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sinkbench.config import ModelSource, RunOptions
from sinkbench.data.stream import Stream, read_stream
from sinkbench.errors import UserError
from sinkbench.models.loading import load_tokenizer
from sinkbench.runs.key import identified, weights
from sinkbench.runs.record import now, write_json
from sinkbench.runs.result import ENDED, FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.strategies import choose

RESULTS = (FINISHED, ENDED, OUT_OF_MEMORY)  # how a cell ends that needs no other try


@dataclass
class Cell:
    """One run of a sweep.

    Attributes:
        identity: what determines its result, with ``key``; empty where that cannot be known yet.
        result: how it ended; ``None`` until then.
        skipped: whether ``result`` was there before.
    """

    options: RunOptions
    identity: dict[str, Any]
    result: RunResult | None = None
    skipped: bool = False

    @property
    def failed(self) -> bool:
        return self.result is not None and self.result.exit_reason.startswith("failed")


def planned(cells: Sequence[RunOptions], folder: Path) -> list[Cell]:
    """Every cell, with the result that ``folder`` already holds of it, under whatever name.

    A cell whose model or text cannot be had now cannot be told apart; it is left to its turn, and to its retries.
    """
    known = finished_in(folder)
    texts, models = _once(_tokens), _once(weights)
    plan = []
    for options in cells:
        chosen = choose(options.experiment, options.window_size, options.attention_sink_size)
        try:
            stream = texts(replace(options, experiment="", output_dir=Path(), name=None))
            identity = identified(options, chosen, stream.tokens, models(options.model))
        except UserError:
            plan.append(Cell(options, {}))
            continue
        found = None if options.overwrite else known.get(identity["key"])
        plan.append(Cell(options, identity, found, skipped=found is not None))
    return plan


def _tokens(options: RunOptions) -> Stream:
    return read_stream(options.source, options.num_tokens + 1, lambda: load_tokenizer(options.model))


def _once(work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``work``, done once for each argument; what a user can mend is told each time."""
    known: dict[Any, Any] = {}

    def answer(argument: Any) -> Any:
        key = argument if isinstance(argument, ModelSource) else (argument.model, argument.source, argument.num_tokens)
        if key not in known:
            try:
                known[key] = work(argument)
            except UserError as error:
                known[key] = error
        if isinstance(known[key], UserError):
            raise known[key]
        return known[key]

    return answer


def finished_in(folder: Path) -> dict[str, RunResult]:
    """Results in ``folder`` and below by what determines them, those whose rows are all there."""
    found = {}
    for path in sorted(folder.rglob("*.json")) if folder.is_dir() else []:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("exit_reason") in RESULTS and isinstance(record.get("key"), str):
            result = _result(path.with_suffix(".csv"), record)
            if _rows_in(result.csv) == result.rows:
                found[record["key"]] = result
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


def _rows_in(csv: Path) -> int:
    try:
        with csv.open("rb") as file:
            return max(0, sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b"")) - 1)
    except OSError:
        return 0


Launch = Callable[
    [Sequence[RunOptions], int, Callable[[int], None], Callable[[int, RunResult], None]],
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
            _tell(cell)
        finished(cell)

    cells = [replace(cell.options, resume=not cell.options.overwrite) for cell in waiting]
    if cells:
        launch(cells, retries, lambda index: started(waiting[index]), ended)


def _tell(cell: Cell) -> None:
    """Put a failure on record where no record tells of it."""
    assert cell.result is not None
    path = cell.options.csv.with_suffix(".json")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = cell.options
        about = {"experiment": options.experiment, "engine": options.engine, "options": vars(options)}
        write_json(path, {**about, **cell.identity, "ended": now(), "exit_reason": cell.result.exit_reason, "rows": 0})
