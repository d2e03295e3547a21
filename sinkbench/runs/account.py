"""What is put on record of a run: as it begins, once model and text are there, and how it ends."""

import sys
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkbench.config import RunConfig
from sinkbench.data.stream import Streams
from sinkbench.errors import UserError
from sinkbench.models.loading import resolved_revision
from sinkbench.models.sizes import context_length_of
from sinkbench.runs.key import fingerprint
from sinkbench.runs.record import device_name, now, versions, write_json
from sinkbench.runs.result import FINISHED, OUT_OF_MEMORY, RunResult
from sinkbench.runs.resume import close_session
from sinkbench.runs.tracing import traced
from sinkbench.runs.writer import RowWriter
from sinkbench.signals import Interrupted
from sinkbench.strategies import Chosen


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


def resolved(config: RunConfig, model: PreTrainedModel, streams: Streams) -> dict[str, Any]:
    """What is known once model and text are there."""
    several = {"streams": len(streams.tokens), "skipped": streams.skipped} if config.documents else {}
    return {
        "model": {
            "name": config.model_name_or_path,
            "class": type(model).__name__,
            "revision": resolved_revision(model),
            "parameters": sum(p.numel() for p in model.parameters()),
            "attention": getattr(model.config, "_attn_implementation", None),
            "random_weights": config.random_weights,
            "context_length": context_length_of(model.config),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "dataset": {
            "name": config.dataset_name,
            "revision": streams.revision,
            "tokens": sum(map(len, streams.tokens)),
            "sha256": fingerprint(*streams.tokens),
            **several,
        },
    }


def close(
    record: dict[str, Any], result: RunResult, writer: RowWriter, error: BaseException | None, reason: str = FINISHED
) -> None:
    """Write the last word of ``record``; ``reason`` is why the run ended, unless that is ``error``.

    Raises:
        UserError: it cannot be written, and nothing else had ended the run.
    """
    if error is not None:
        reason = exit_reason(error)
    result.exit_reason = reason
    record |= {
        "ended": now(),
        "exit_reason": reason,
        "rows": result.rows,
        **({"rows_written": writer.written} if writer.every > 1 else {}),
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
