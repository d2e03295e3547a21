"""One run: a model, a strategy and a stream in; a CSV and a JSON out."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
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
from sinkbench.compilers import launching_on
from sinkbench.config import ModelSource, RunConfig
from sinkbench.data.protocols import Window, scored_by
from sinkbench.data.spelling import TextSize, predicted_text
from sinkbench.data.stream import Streams, read_streams
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.step import Steps
from sinkbench.engines.streams import run_many
from sinkbench.engines.windows import read_windows
from sinkbench.errors import UserError, out_of_memory
from sinkbench.models.loading import Checkpoint, check_format, load_model, load_tokenizer, locate
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.bare import device_of
from sinkbench.results.columns import further_columns
from sinkbench.results.divergence import beyond_training
from sinkbench.results.record import SPELLED
from sinkbench.runs.account import close, exit_reason, opening, resolved
from sinkbench.runs.key import identified, weights_of
from sinkbench.runs.protocol import lead_of, on_record, tokens_for, windows_for
from sinkbench.runs.record import write_json
from sinkbench.runs.result import ENDED, FINISHED, RunResult
from sinkbench.runs.resume import resumed
from sinkbench.runs.tracing import begun_trace, keep_trace, lacks_trace
from sinkbench.runs.writer import RowWriter
from sinkbench.signals import Interrupted, check, signals, undisturbed
from sinkbench.strategies import Chosen
from sinkbench.strategies.naming import named
from sinkbench.strategies.reference import end_of, reference_by, span
from sinkbench.strategies.registry import chosen_by

Watch = Callable[[Steps, RunResult], None]
Read = Callable[[RunConfig, Callable[[], object]], Streams]


def read_text(config: RunConfig, tokenizer: Callable[[], object]) -> Streams:
    """The streams of ``config``, tokenised by what ``tokenizer`` answers with, if that is needed."""
    return read_streams(config.source, tokens_for(config), tokenizer)


def run(
    config: RunConfig,
    watch: Watch = lambda step, result: None,
    load: Callable[[Checkpoint], PreTrainedModel] = load_model,
    note: Callable[[str], None] = lambda line: None,
    find: Callable[[ModelSource], Checkpoint] = locate,
    stage: Callable[[str], None] = lambda what: None,
    read: Read = read_text,
) -> RunResult:
    """Carry out one run.

    With ``config.resume`` a run that was broken off goes on behind its last row.

    Args:
        watch: is called after each written row.
        load: gives the model when it is needed.
        note: is called with a line about something that does not end the run.
        find: looks for the model.
        stage: is called with what goes on before the first row.
        read: gives the text.

    Raises:
        UserError: whatever the user can mend; rows that are complete stay.
    """
    config, chosen = named(config), chosen_by(config)
    if config.protocol != "stream" and config.resume:  # as a sweep asks of all: windows are soon read anew
        config = config.but(resume=False, overwrite=True)
    result = RunResult(chosen.name, config.csv)
    reference = reference_by(config)
    with signals() as watching, _writer_for(config) as writer:
        record = opening(config, chosen)
        work = _Work(config, chosen, reference, record, result, writer, watch, note, stage)
        error = watching.attempt(lambda: work.carry_out(load, cache(lambda: find(config.model)), read))
        error = (error and out_of_memory(error)) or error
        if error is None or isinstance(error, torch.OutOfMemoryError):
            error = writer.disturbed() or error
        error = work.keep_trace(error)
        if work.all_there and error is not None:
            result.exit_reason = exit_reason(error)  # of this session, which was to add a trace: the rows are finished
        elif not work.on_record:
            record |= work.spelled()
            close(record, result, writer, error, work.reason)
    if error is not None and not isinstance(error, (Interrupted, torch.OutOfMemoryError)):
        raise error
    return result


@dataclass
class _Work:
    """A run under way.

    Attributes:
        reference: the strategy to diverge from; ``None`` for none.
        reason: how it ends if nothing ends it early.
        all_there: whether all rows were there before.
        on_record: whether their record says so, and no trace is to be added.
        trace: what takes note of evictions.
        size_of: the size of the text that so many rows predict; ``None`` where no tokenizer can be had.
    """

    config: RunConfig
    chosen: Chosen
    reference: Chosen | None
    record: dict[str, Any]
    result: RunResult
    writer: RowWriter
    watch: Watch
    note: Callable[[str], None]
    stage: Callable[[str], None]
    reason: str = FINISHED
    all_there: bool = False
    on_record: bool = False
    trace: Trace | None = None
    size_of: Callable[[int], TextSize | None] = lambda rows: None

    def carry_out(
        self, load: Callable[[Checkpoint], PreTrainedModel], checkpoint: Callable[[], Checkpoint], read: Read
    ) -> None:
        """Everything between the opening of the files and their end."""
        config, chosen, record, writer = self.config, self.chosen, self.record, self.writer
        tokenizer = cache(lambda: load_tokenizer(checkpoint()))
        self.stage("reading the text")
        streams = read(config, tokenizer)
        windows = windows_for(config, streams.tokens[0])
        self.size_of = partial(_size_of, streams, windows, tokenizer)
        expected = streams.predictions if windows is None else sum(window.predictions for window in windows)
        self.result.expected = expected
        if not config.documents and streams.exhausted and len(streams.tokens[0]) < tokens_for(config):
            self.reason = ENDED
        record |= identified(config, chosen, streams.tokens, weights_of(checkpoint()))
        check()
        if config.resume:
            with undisturbed():  # file, record and result are taken up together
                resumed(writer, record, streams.tokens, self.result)
        self.all_there = writer.rows == expected
        if self.all_there:
            writer.trim()
            self.result.exit_reason = self.reason
            if not lacks_trace(config, chosen, config.csv, writer.rows):
                self.on_record = record["exit_reason"] == self.reason
                return
        check_format(chosen, checkpoint())
        self.stage("loading the model")
        model = load(checkpoint())
        check()
        self.stage("reading the first tokens")
        _check_unchanged(checkpoint(), record)
        _check_vocabulary(streams.tokens, model, config)
        record |= resolved(config, model, streams)
        if streams.skipped:
            self.note(f"{streams.skipped:,} of the rows have fewer than 2 tokens and are left out")
        with launching_on(device_of(model)):
            if windows is None:
                self._read(model, streams.tokens)
            else:
                self._read_windows(model, streams.tokens[0], windows, lead_of(config, checkpoint(), model))

    def _read_windows(self, model: PreTrainedModel, text: Tensor, windows: list[Window], lead: int | None) -> None:
        config, record = self.config, self.record
        record["protocol"] = on_record(config, windows, lead)
        note = _noting(record, self.result, self.note)
        trained, longest = record["model"]["context_length"], max(window.fed for window in windows)
        if trained is not None and longest > trained:
            note(f"windows of {longest:,} tokens are longer than the {trained:,} the model was trained for")
        steps = ((0, one) for one in read_windows(model, text, windows, lead, config.chunk_size))
        _write(steps, [text], self.writer, self.result, _overflows(self.watch, note, record["dtype"]), record)

    def _read(self, model: PreTrainedModel, streams: Sequence[Tensor]) -> None:
        config, record, writer = self.config, self.record, self.writer
        sizes = layer_sizes(model.config)
        plan, reference = self.chosen.plan(sizes), self.reference and self.reference.plan(sizes)
        note = _noting(record, self.result, self.note)
        how = config.engine, config.cuda_graphs, config.chunk_size
        if self.reference and reference:
            record["reference"] = {"strategy": self.reference.name, "span": span(reference)}
        longest = max(len(tokens) - 1 for tokens in streams)
        beyond, until = beyond_training(record, longest), end_of(reference, longest, record["model"]["context_length"])
        engine = choose_engine(model, plan, *how, note, self.stage, reference, until)
        if beyond is not None:
            note(beyond)
        self.trace = begun_trace(config, plan, note)
        if self.all_there and not plan.by_score:
            return  # the trace follows from the plan
        first, start = place_of(streams, writer.rows)
        steps = run_many(engine, plan, streams, first, start, self.trace)
        _write(steps, streams, writer, self.result, _overflows(self.watch, note, record["dtype"]), record)

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


def _writer_for(config: RunConfig) -> RowWriter:
    columns, gaps = further_columns(config), config.protocol != "stream"
    return RowWriter(config.csv, config.overwrite, columns, config.resume, config.every, gaps)


def place_of(streams: Sequence[Tensor], rows: int) -> tuple[int, int]:
    """The stream in which the first ``rows`` predictions of ``streams`` end, and how many of them are its own.

    Where these are all, it is the last one, whole.
    """
    for index, tokens in enumerate(streams[:-1]):
        if rows < len(tokens) - 1:
            return index, rows
        rows -= len(tokens) - 1
    return len(streams) - 1, rows


def _size_of(
    streams: Streams, windows: list[Window] | None, tokenizer: Callable[[], Any], rows: int
) -> TextSize | None:
    """The size of the text that the first ``rows`` rows predict; ``None`` where no tokenizer can say it."""
    last, own = place_of(streams.tokens, rows)
    read = [*streams.tokens[:last], streams.tokens[last][: own + 1]] if windows is None else streams.tokens
    stretches = None if windows is None else scored_by(windows, rows)
    with suppress(Exception):  # of a tokenizer: rows that are written do not depend on it
        ids = [tokens.tolist() for tokens in read]
        return predicted_text(tokenizer(), ids, not streams.pretokenised, stretches)
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
    steps: Iterator[tuple[int, Steps]],
    streams: Sequence[Tensor],
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
        for index, step in chain([first], steps):
            tokens = streams[index]
            predicted = tokens[step.first : step.first + len(step.nll)].tolist()
            more: dict[str, Sequence[float | None]] = dict(step.columns)
            if "stream" in writer.columns:
                more["stream"] = [index] * len(predicted)
            with undisturbed():
                writer.write(step, predicted, more, last=len(tokens) - 1)
                result.stream = index
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
        with undisturbed(), suppress(UserError):  # whoever goes on does without it
            writer.write_left()


def _check_unchanged(checkpoint: Checkpoint, record: dict[str, Any]) -> None:
    if weights_of(checkpoint) != record["determined_by"]["weights"]:
        raise UserError(f"the files of {checkpoint.source.name!r} were changed while they were read: run it again")


def _check_vocabulary(streams: Sequence[Tensor], model: PreTrainedModel, config: RunConfig) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = min(int(tokens.min()) for tokens in streams), max(int(tokens.max()) for tokens in streams)
    if low < 0 or high >= size:
        raise UserError(
            f"token id {low if low < 0 else high} in {config.dataset_name!r} is outside the vocabulary of "
            f"{config.model_name_or_path!r} (0 to {size - 1}): the stream was tokenised for another model"
        )
