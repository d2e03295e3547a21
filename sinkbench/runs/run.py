"""One run: a model, a strategy and a stream in; a CSV and a JSON out."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.config import ModelSource, RunConfig
from sinkbench.data.stream import Stream, read_stream
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError, out_of_memory
from sinkbench.models.loading import Checkpoint, check_format, load_model, load_tokenizer, locate, resolved_revision
from sinkbench.models.sizes import layer_sizes
from sinkbench.runs.key import fingerprint, identified, weights_of
from sinkbench.runs.record import device_name, now, versions, write_json
from sinkbench.runs.result import ENDED, FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.runs.resume import close_session, resumed
from sinkbench.runs.signals import Interrupted, signals, undisturbed
from sinkbench.runs.writer import RowWriter
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
    with RowWriter(config.csv, config.overwrite, resume=config.resume) as writer, signals():
        record, reason, error = opening(config, chosen), FINISHED, None
        checkpoint = cache(lambda: find(config.model))
        try:
            stream = read_stream(config.source, config.num_tokens + 1, lambda: load_tokenizer(checkpoint()))
            if stream.exhausted and len(stream.tokens) - 1 < config.num_tokens:
                reason = ENDED
            record |= identified(config, chosen, stream.tokens, weights_of(checkpoint()))
            if config.resume:
                resumed(writer, record, stream.tokens, result)
                if writer.rows == len(stream.tokens) - 1 and record["exit_reason"] == reason:
                    result.exit_reason = reason
                    return result  # it is complete, and so is its record
            if writer.rows < len(stream.tokens) - 1:
                check_format(chosen, checkpoint())
                model = load(checkpoint())
                _check_vocabulary(stream.tokens, model, config)
                record |= _resolved(config, model, stream)
                plan = chosen.plan(layer_sizes(model.config))
                engine = choose_engine(
                    model, plan, config.engine, config.cuda_graphs, config.chunk_size, _noting(record, result, note)
                )
                steps = engine.run(plan, stream.tokens, writer.rows)
                _write(steps, stream.tokens, writer, result, watch, record)
        except BaseException as caught:
            error = out_of_memory(caught) or caught
        _close(record, result, writer, error, reason)
    if error is not None and not isinstance(error, (Interrupted, torch.OutOfMemoryError)):
        raise error
    return result


def _noting(record: dict[str, Any], result: RunResult, note: Callable[[str], None]) -> Callable[[str], None]:
    """``note``, and the line on record."""

    def noted(line: str) -> None:
        record["notes"] = [*record.get("notes", []), line]
        result.notes.append(line)
        note(line)

    return noted


def _write(
    steps: Iterator[Steps],
    tokens: Tensor,
    writer: RowWriter,
    result: RunResult,
    watch: Watch,
    record: dict[str, Any],
) -> None:
    """Write all steps as they come, and the opening record before the first of them."""
    latencies, before = list(writer.latencies), result.seconds
    begin = time.perf_counter()
    first = next(steps)  # what a user can mend shows before anything is written
    record |= {"seconds": before, "timed_rows": result.rows - result.untimed}  # should this session be killed
    write_json(writer.path.with_suffix(".json"), record, ready=writer.begin)
    try:
        for step in chain([first], steps):
            predicted = tokens[step.first : step.first + len(step.nll)].tolist()
            with undisturbed():
                writer.write(step, predicted)
                result.rows, result.overall_ppl = writer.rows, writer.perplexity  # what is written is on record
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
        "command": ["sinkbench", *sys.argv[1:]],
    }
    return {
        "experiment": chosen.name,
        "engine": config.engine,
        "options": config.model_dump(mode="json"),
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
        "seconds": result.seconds,
        "timed_rows": result.rows - result.untimed,
        "tokens_per_second": result.tokens_per_second,
        "median_latency": result.latency,
        "peak_vram_gib": result.peak_vram,
        "peak_kv_cache_bytes": result.kv_cache_bytes,
    }
    close_session(record, result)
    if isinstance(error, UserError) and not result.rows:
        if writer.begun:
            writer.path.with_suffix(".json").unlink(missing_ok=True)  # it promises rows, and not one could be written
        return  # the message says it all
    if writer.rows or not writer.replaces:
        try:
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


def _check_vocabulary(tokens: Tensor, model: PreTrainedModel, config: RunConfig) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= size:
        raise UserError(
            f"token id {low if low < 0 else high} in {config.dataset_name!r} is outside the vocabulary of "
            f"{config.model_name_or_path!r} (0 to {size - 1}): the stream was tokenised for another model"
        )
