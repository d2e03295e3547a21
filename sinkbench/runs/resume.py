"""A run taken up where it was broken off: its rows are checked against the stream, and its record goes on."""

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from sinkbench.errors import UserError
from sinkbench.results.columns import BASE_COLUMNS
from sinkbench.results.record import read_record
from sinkbench.runs.result import RunResult
from sinkbench.runs.writer import RowWriter, complete_rows
from sinkbench.validation import checked

if TYPE_CHECKING:
    import pandas as pd

GROWS = ("num_tokens", "tokens")  # a run may go on for longer than it was begun for; its tokens are compared one by one
SLACK = 1e-6  # of a perplexity against its NLL: another machine's exp may round otherwise
ROUNDS = ("chunk_size", "cuda_graphs")  # what float32 numbers depend on by rounding alone
BEGIN_ANEW = "give --overwrite to begin anew, or another --output-dir"


def resumed(writer: RowWriter, record: dict[str, Any], tokens: Tensor, result: RunResult) -> None:
    """Let ``writer``, ``record`` and ``result`` stand where the run was broken off; nothing where there is none.

    Raises:
        UserError: what is there belongs to another run, or is damaged.
    """
    if not writer.replaces:
        return
    before = _record(writer.path)
    _same_run(writer.path, before, record)
    rows = complete_rows(writer.path, writer.columns)
    if not len(rows):
        return
    writer.take_up(rows, _checked_sum(writer.path, rows.frame, tokens))
    this = record["sessions"][0]
    kept = ("started", "ended", "exit_reason", "resumed_at", "device", "versions", "command", "notes")
    record |= {name: before[name] for name in kept if name in before}
    record["sessions"] = _sessions(before, writer.rows)
    if writer.rows < len(tokens) - 1:
        record |= {
            "resumed_at": [*(before.get("resumed_at") or []), writer.rows],
            "exit_reason": "running",
            "ended": None,
            "device": this["device"],
            "versions": this["versions"],
            "sessions": [*record["sessions"], {**this, "first_row": writer.rows + 1}],
        }
    result.rows, result.overall_ppl, result.not_finite = writer.rows, writer.perplexity, writer.not_finite
    result.seconds = before.get("seconds") or 0.0
    result.untimed = max(0, writer.rows - (before.get("timed_rows", before.get("rows")) or 0))
    result.peak_vram = max(rows.frame["cuda_vram_allocated"].dropna(), default=None)
    result.kv_cache_bytes = int(rows.frame["kv_cache_bytes"].max())
    result.latency = median(writer.latencies) if writer.latencies else None
    for name in ("model", "dataset", "dtype"):  # of a run that is complete; the others say it anew
        record.setdefault(name, before.get(name))


def _sessions(before: dict[str, Any], kept: int) -> list[dict[str, Any]]:
    """The sessions of a record, each with those of its rows that are among the ``kept`` first ones.

    One that was killed could not say how many it wrote. Of a record of a time before there were any, it is one.
    """
    known = ("started", "ended", "exit_reason", "device", "versions", "command", "seconds")
    sessions = before.get("sessions") or [{**{name: before.get(name) for name in known}, "first_row": 1}]
    ends = [*(session["first_row"] - 1 for session in sessions[1:]), kept]
    return [
        {
            **session,
            "rows": max(0, min(end, kept) - session["first_row"] + 1),
            "exit_reason": "killed" if session["exit_reason"] == "running" else session["exit_reason"],
        }
        for session, end in zip(sessions, ends, strict=True)
    ]


def close_session(record: dict[str, Any], result: RunResult) -> None:
    """Say of the newest session how it ended, and how many rows are its own."""
    *earlier, newest = record["sessions"]
    if newest["exit_reason"] != "running":
        return  # all rows were there before
    done = sum(session.get("seconds") or 0.0 for session in earlier)
    newest |= {
        "ended": record["ended"],
        "exit_reason": record["exit_reason"],
        "rows": max(0, result.rows - newest["first_row"] + 1),
        "seconds": max(0.0, result.seconds - done),
    }


def _record(csv: Path) -> dict[str, Any]:
    path = csv.with_suffix(".json")
    if not path.exists():
        raise UserError(f"cannot go on with {csv}: its record {path.name} is missing; {BEGIN_ANEW}")
    try:
        record = read_record(path) or {}
    except UserError as error:
        raise UserError(f"cannot go on with {csv}: its record {path.name} cannot be read; {BEGIN_ANEW}") from error
    if not isinstance(record.get("determined_by"), dict):
        raise UserError(f"cannot go on with {csv}: its record does not say what determined it; {BEGIN_ANEW}")
    try:
        checked(_Taken, record, lambda key: f"{key} ")
    except UserError as error:
        raise UserError(
            f"cannot go on with {csv}: its record {path.name} is damaged ({error}); {BEGIN_ANEW}"
        ) from error
    return record


class _Session(BaseModel):
    """What has to be known of a session; further keys do not matter."""

    model_config = ConfigDict(strict=True)

    first_row: PositiveInt
    exit_reason: str
    seconds: NonNegativeFloat | None = None


class _Taken(BaseModel):
    """What is taken from a record as it stands; further keys do not matter."""

    model_config = ConfigDict(strict=True)

    exit_reason: str | None = None
    rows: NonNegativeInt | None = None
    timed_rows: NonNegativeInt | None = None
    seconds: NonNegativeFloat | None = None
    resumed_at: list[int] | None = None
    notes: list[Any] | None = None
    sessions: list[_Session] | None = None


def _same_run(csv: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    was, now = before["determined_by"], record["determined_by"]
    if "strategy" not in was:
        raise UserError(f"cannot go on with {csv}: an older sinkbench wrote it, whose keys say less; {BEGIN_ANEW}")
    free = GROWS + (ROUNDS if now["dtype"] == "float32" else ())
    for name in dict.fromkeys([*now, "reference"]):  # which is there only where there is one
        if name not in free and was.get(name) != now.get(name):
            what, old, new = _difference(name, was.get(name), now.get(name))
            raise UserError(
                f"cannot go on with {csv}: it is of another run, whose {what} was {old} and not {new}; {BEGIN_ANEW}"
            )


def _difference(name: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """Where two values differ: within tables, the first entry that does."""
    if isinstance(was, dict) and isinstance(now, dict):
        key = next(key for key in {**now, **was} if was.get(key) != now.get(key))
        return _difference(key, was.get(key), now.get(key))
    old, new = (value.get("strategy") if isinstance(value, dict) else value for value in (was, now))
    return name, old, new


def _checked_sum(csv: Path, frame: "pd.DataFrame", tokens: Tensor) -> float:
    """The sum of the NLLs; every row must be one that this run would have written."""
    if len(frame) > len(tokens) - 1:
        raise UserError(f"cannot go on with {csv}: it has {len(frame)} rows, more than the {len(tokens) - 1} asked for")
    rows = {name: frame[name].to_numpy() for name in BASE_COLUMNS}
    number = np.arange(1, len(frame) + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.cumsum(rows["nll"])
        right = (rows["input_length"] == number) & ~np.isneginf(rows["nll"])  # a model may overflow: then it is none
        right &= np.isclose(rows["ppl"], np.exp(rows["nll"]), rtol=SLACK, atol=0, equal_nan=True)
        right &= np.isclose(rows["overall_ppl"], np.exp(sums / number), rtol=SLACK, atol=0, equal_nan=True)
        right &= np.isfinite(rows["kv_cache_bytes"]) & np.isfinite(rows["token"])
    same = rows["token"] == tokens[1 : len(frame) + 1].numpy()
    wrong = np.flatnonzero(~(right & same))
    if len(wrong):
        what = "is of another text" if right[wrong[0]] else "is damaged"
        raise UserError(f"cannot go on with {csv}: line {wrong[0] + 2} {what}; {BEGIN_ANEW}")
    return float(sums[-1])
