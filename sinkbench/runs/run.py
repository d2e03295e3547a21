"""One run: a model, a strategy and a stream in; a CSV and a JSON out."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.trace import Trace
from sinkbench.config import ModelSource, RunConfig
from sinkbench.data.spelling import TextSize, predicted_text
from sinkbench.data.stream import Stream, read_stream
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError, out_of_memory
from sinkbench.models.loading import Checkpoint, check_format, load_model, load_tokenizer, locate, resolved_revision
from sinkbench.models.sizes import layer_sizes
from sinkbench.results.record import SPELLED
from sinkbench.runs.key import fingerprint, identified, weights_of
from sinkbench.runs.record import device_name, now, versions, write_json
from sinkbench.runs.result import ENDED, FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.runs.resume import close_session, resumed
from sinkbench.runs.tracing import begun_trace, keep_trace, lacks_trace, traced
from sinkbench.runs.writer import RowWriter
from sinkbench.signals import Interrupted, check, signals, undisturbed
from sinkbench.strategies import Chosen
from sinkbench.strategies.naming import named
from sinkbench.strategies.registry import chosen_by

Watch = Callable[[Steps, RunResult], None]


def run(
    config: RunConfig,
    watch: Watch = lambda step, result: None,
    load: Callable[[Checkpoint], PreTrainedModel] = load_model,
    note: Callable[[str], None] = lambda line: None,
    find: Callable[[ModelSource], Checkpoint] = locate,
) -> RunResult:
    """Carry out one run.

    With ``config.resume`` a run that was broken off goes on behind its last row.

    Args:
        watch: is called after each written row.
        load: gives the model when it is needed.
        note: is called with a line about something that does not end the run.
        find: looks for the model.

    Raises:
        UserError: whatever the user can mend; rows that are complete stay.
    """
    config, chosen = named(config), chosen_by(config)
    result = RunResult(chosen.name, config.csv)
    with signals() as watching, RowWriter(config.csv, config.overwrite, resume=config.resume) as writer:
        record = opening(config, chosen)
        work = _Work(config, chosen, record, result, writer, watch, note)
        error = watching.attempt(lambda: work.carry_out(load, cache(lambda: find(config.model))))
        error = (error and out_of_memory(error)) or error
        if error is None or isinstance(error, torch.OutOfMemoryError):
            error = writer.disturbed() or error
        error = work.keep_trace(error)
        if work.all_there and error is not None:
            result.exit_reason = exit_reason(error)  # of this session, which was to add a trace: the rows are finished
        elif not work.on_record:
            record |= work.spelled()
            _close(record, result, writer, error, work.reason)
    if error is not None and not isinstance(error, (Interrupted, torch.OutOfMemoryError)):
        raise error
    return result


@dataclass
class _Work:
    """A run under way.

    Attributes:
        reason: how it ends if nothing ends it early.
        all_there: whether all rows were there before.
        on_record: whether their record says so, and no trace is to be added.
        trace: what takes note of evictions.
        size_of: the size of the text that so many rows predict; ``None`` where no tokenizer can be had.
    """

    config: RunConfig
    chosen: Chosen
    record: dict[str, Any]
    result: RunResult
    writer: RowWriter
    watch: Watch
    note: Callable[[str], None]
    reason: str = FINISHED
    all_there: bool = False
    on_record: bool = False
    trace: Trace | None = None
    size_of: Callable[[int], TextSize | None] = lambda rows: None

    def carry_out(self, load: Callable[[Checkpoint], PreTrainedModel], checkpoint: Callable[[], Checkpoint]) -> None:
        """Everything between the opening of the files and their end."""
        config, chosen, record, writer = self.config, self.chosen, self.record, self.writer
        tokenizer = cache(lambda: load_tokenizer(checkpoint()))
        stream = read_stream(config.source, config.num_tokens + 1, tokenizer)
        self.size_of = partial(_size_of, stream, tokenizer)
        if stream.exhausted and len(stream.tokens) - 1 < config.num_tokens:
            self.reason = ENDED
        record |= identified(config, chosen, stream.tokens, weights_of(checkpoint()))
        check()
        if config.resume:
            with undisturbed():  # file, record and result are taken up together
                resumed(writer, record, stream.tokens, self.result)
        self.all_there = writer.rows == len(stream.tokens) - 1
        if self.all_there:
            writer.trim()
            self.result.exit_reason = self.reason
            if not lacks_trace(config, chosen, config.csv, writer.rows):
                self.on_record = record["exit_reason"] == self.reason
                return
        check_format(chosen, checkpoint())
        model = load(checkpoint())
        check()
        _check_unchanged(checkpoint(), record)
        _check_vocabulary(stream.tokens, model, config)
        record |= _resolved(config, model, stream)
        self._read(model, stream.tokens)

    def _read(self, model: PreTrainedModel, tokens: Tensor) -> None:
        config, record, writer = self.config, self.record, self.writer
        plan = self.chosen.plan(layer_sizes(model.config))
        note = _noting(record, self.result, self.note)
        engine = choose_engine(model, plan, config.engine, config.cuda_graphs, config.chunk_size, note)
        self.trace = begun_trace(config, plan, note)
        if self.all_there and not plan.by_score:
            return  # the trace follows from the plan
        steps = engine.run(plan, tokens, writer.rows, self.trace)
        _write(steps, tokens, writer, self.result, _overflows(self.watch, note, record["dtype"]), record)

    def spelled(self) -> dict[str, Any]:
        """What the record says of the text that the rows predict; nothing where that is not known."""
        size = self.size_of(self.result.rows) if self.result.rows else None
        return {} if size is None else {SPELLED: asdict(size)}

    def keep_trace(self, error: BaseException | None) -> BaseException | None:
        """Write what was noted; ``error`` is what ended the work, and the answer what did, this among it."""
        read_so_far = error is None or (self.writer.begun and not self.all_there)
        if self.trace is None or not self.writer.rows or not read_so_far:
            return error
        return keep_trace(self.trace, self.chosen, self.writer, error)


def _size_of(stream: Stream, tokenizer: Callable[[], Any], rows: int) -> TextSize | None:
    """The size of the text that the first ``rows`` rows predict; ``None`` where no tokenizer can say it."""
    with suppress(Exception):  # of a tokenizer: rows that are written do not depend on it
        return predicted_text(tokenizer(), stream.tokens[: rows + 1].tolist(), literal=not stream.pretokenised)
    return None


def _noting(record: dict[str, Any], result: RunResult, note: Callable[[str], None]) -> Callable[[str], None]:
    """``note``, and the line on record."""

    def noted(line: str) -> None:
        record["notes"] = [*record.get("notes", []), line]
        result.notes.append(line)
        note(line)

    return noted


def _overflows(watch: Watch, say: Callable[[str], None], dtype: str) -> Watch:
    """``watch``, and a line at the first NLL that is no number."""
    said = False

    def watched(step: Steps, result: RunResult) -> None:
        nonlocal said
        wrong = next((i for i, nll in enumerate(step.nll) if not math.isfinite(nll)), None)
        if wrong is not None and not said:
            said = True
            advice = "" if dtype == "float32" else ", try --dtype float32"
            say(
                f"the NLL of row {step.first + wrong} is {step.nll[wrong]}, and so is the perplexity from there on: "
                f"the model's numbers overflow in {dtype}{advice}"
            )
        watch(step, result)

    return watched


def _write(
    steps: Iterator[Steps],
    tokens: Tensor,
    writer: RowWriter,
    result: RunResult,
    watch: Watch,
    record: dict[str, Any],
) -> None:
    """Write all steps as they come, and the opening record before the first of them; nothing where there are none."""
    latencies, before = list(writer.latencies), result.seconds
    begin = time.perf_counter()
    first = next(steps, None)  # what a user can mend shows before anything is written
    if first is None:
        return
    record |= {"seconds": before, "timed_rows": result.rows - result.untimed}  # should this session be killed
    write_json(writer.path.with_suffix(".json"), record, ready=writer.begin)
    try:
        for step in chain([first], steps):
            predicted = tokens[step.first : step.first + len(step.nll)].tolist()
            with undisturbed():
                writer.write(step, predicted)
                result.rows, result.overall_ppl = writer.rows, writer.perplexity  # what is written is on record
                result.not_finite = writer.not_finite
            result.seconds = before + time.perf_counter() - begin
            result.kv_cache_bytes = max(result.kv_cache_bytes, *step.kv_cache_bytes)
            if step.latency is not None:
                latencies.append(step.latency)
            if step.vram is not None:
                result.peak_vram = max(result.peak_vram or 0.0, step.vram)
            watch(step, result)
    finally:
        result.latency = median(latencies) if latencies else None


def opening(config: RunConfig, chosen: Chosen) -> dict[str, Any]:
    """What a record says from the first row on."""
    session = {
        "started": now(),
        "ended": None,
        "exit_reason": "running",
        "device": device_name(config.device_map),
        "versions": versions(),
        "command": [config.objects.call] if config.objects.call else ["sinkbench", *sys.argv[1:]],
    }
    return {
        "experiment": chosen.name,
        "engine": config.engine,
        "options": config.model_dump(mode="json"),
        **({"objects": config.objects.given} if config.objects.given else {}),
        **session,
        "sessions": [{**session, "first_row": 1, "rows": 0, "seconds": 0.0}],
    }


def _resolved(config: RunConfig, model: PreTrainedModel, stream: Stream) -> dict[str, Any]:
    return {
        "model": {
            "name": config.model_name_or_path,
            "class": type(model).__name__,
            "revision": resolved_revision(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention": getattr(model.config, "_attn_implementation", None),
            "random_weights": config.random_weights,
            "context_length": getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "dataset": {
            "name": config.dataset_name,
            "revision": stream.revision,
            "tokens": len(stream.tokens),
            "sha256": fingerprint(stream.tokens),
        },
    }


def _close(
    record: dict[str, Any], result: RunResult, writer: RowWriter, error: BaseException | None, reason: str = FINISHED
) -> None:
    if error is not None:
        reason = exit_reason(error)
    result.exit_reason = reason
    record |= {
        "ended": now(),
        "exit_reason": reason,
        "rows": result.rows,
        "overall_ppl": result.overall_ppl if result.rows else None,
        "rows_not_finite": result.not_finite,
        "seconds": result.seconds,
        "timed_rows": result.rows - result.untimed,
        "tokens_per_second": result.tokens_per_second,
        "median_latency": result.latency,
        "peak_vram_gib": result.peak_vram,
        "peak_kv_cache_bytes": result.kv_cache_bytes,
    }
    record |= traced(writer.path, result.rows)
    close_session(record, result)
    if isinstance(error, UserError) and not (writer.begun and result.rows):
        if writer.begun:
            with suppress(OSError):  # it promises rows, and not one could be written
                writer.path.with_suffix(".json").unlink()
        return  # the message says it all
    if writer.rows or not writer.replaces:
        try:
            writer.trim()  # of an older result, no more than the rows that the record counts
            write_json(writer.path.with_suffix(".json"), record)
        except UserError:
            if error is None:
                raise  # otherwise what came first is what the user has to know


def exit_reason(error: BaseException) -> str:
    """What is put on record of what ended a run early."""
    if isinstance(error, Interrupted):
        return error.reason
    return OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else failure(error)


def failure(error: BaseException) -> str:
    """The exit reason of a run that ended in ``error``."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return "failed: " + " ".join(f"{kind}{error}".split())


def _check_unchanged(checkpoint: Checkpoint, record: dict[str, Any]) -> None:
    if weights_of(checkpoint) != record["determined_by"]["weights"]:
        raise UserError(f"the files of {checkpoint.source.name!r} were changed while they were read: run it again")


def _check_vocabulary(tokens: Tensor, model: PreTrainedModel, config: RunConfig) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise UserError(
            f"token id {low if low < 0 else high} in {config.dataset_name!r} is outside the vocabulary of "
            f"{config.model_name_or_path!r} (0 to {size - 1}): the stream was tokenised for another model"
        )
