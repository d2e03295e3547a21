"""A run taken up where it was broken off: its rows are checked against the stream, and its record goes on."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from sinkbench.config import LATER
from sinkbench.errors import UserError
from sinkbench.files import read_bytes
from sinkbench.results.columns import BASE_COLUMNS
from sinkbench.results.record import read_record
from sinkbench.results.rows import Rows
from sinkbench.runs.result import RunResult
from sinkbench.runs.writer import RowWriter, complete_rows, sum_behind
from sinkbench.validation import checked

GROWS = ("num_tokens", "tokens")  # a run may go on for longer than it was begun for; its tokens are compared one by one
SLACK = 1e-6  # of a perplexity against its NLL: another machine's exp may round otherwise
ROUNDS = ("chunk_size", "cuda_graphs")  # what float32 numbers depend on by rounding alone
BEGIN_ANEW = "give --overwrite to begin anew, or another --output-dir"


def resumed(writer: RowWriter, record: dict[str, Any], streams: Sequence[Tensor], result: RunResult) -> None:
    """Let ``writer``, ``record`` and ``result`` stand where the run was broken off; nothing where there is none.

    Raises:
        UserError: what is there belongs to another run, or is damaged.
    """
    if not writer.replaces:
        return
    before = _record(writer.path)
    _same_run(writer.path, before, record)
    due = due_rows(streams, writer.every)
    rows = complete_rows(writer.path, writer.columns)
    if writer.every > 1:
        rows = _without_left(writer.path, rows, due)
    if not len(rows):
        return
    total = _checked_sum(writer.path, rows, due, writer.every)
    writer.take_up(rows, total, int(due["number"][len(rows) - 1]))
    if writer.every > 1:  # some may be in rows that were not written
        writer.not_finite = max(writer.not_finite, before.get("rows_not_finite") or 0)
    this = record["sessions"][0]
    kept = ("started", "ended", "exit_reason", "resumed_at", "device", "versions", "command", "notes")
    record |= {name: before[name] for name in kept if name in before}
    record["sessions"] = _sessions(before, writer.rows)
    if len(rows) < len(due["number"]):
        record |= {
            "resumed_at": [*(before.get("resumed_at") or []), writer.rows],
            "exit_reason": "running",
            "ended": None,
            "device": this["device"],
            "versions": this["versions"],
            "sessions": [*record["sessions"], {**this, "first_row": writer.rows + 1}],
        }
    result.rows, result.overall_ppl, result.not_finite = writer.rows, writer.perplexity, writer.not_finite
    result.stream = int(due["stream"][len(rows) - 1])
    result.seconds = before.get("seconds") or 0.0
    result.untimed = max(0, writer.rows - (before.get("timed_rows", before.get("rows")) or 0))
    result.peak_vram = max(rows.frame["cuda_vram_allocated"].dropna(), default=None)
    result.kv_cache_bytes = int(rows.frame["kv_cache_bytes"].max())
    if writer.every > 1:  # the highest may be in a row that was not written
        result.kv_cache_bytes = max(result.kv_cache_bytes, before.get("peak_kv_cache_bytes") or 0)
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
    rows_not_finite: NonNegativeInt | None = None
    peak_kv_cache_bytes: NonNegativeInt | None = None
    seconds: NonNegativeFloat | None = None
    resumed_at: list[int] | None = None
    notes: list[Any] | None = None
    sessions: list[_Session] | None = None


def _same_run(csv: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    was, now = before["determined_by"], record["determined_by"]
    if "strategy" not in was:
        raise UserError(f"cannot go on with {csv}: an older sinkbench wrote it, whose keys say less; {BEGIN_ANEW}")
    # of documents, more may follow; each is read as far as before
    free = (GROWS if "documents" not in now else ("tokens",)) + (ROUNDS if now["dtype"] == "float32" else ())
    later = {**LATER, "reference": None}
    was, now = {**later, **was}, {**later, **now}
    for name in now:
        if name not in free and was.get(name) != now[name]:
            what, old, new = _difference(name, was.get(name), now[name])
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


def due_rows(streams: Sequence[Tensor], every: int) -> dict[str, np.ndarray]:
    """Where the rows of a whole run are, by column; ``number``: over how many tokens the mean of a row is."""
    parts: dict[str, list[np.ndarray]] = {"stream": [], "input_length": [], "number": [], "token": []}
    before = 0
    for stream, tokens in enumerate(streams):
        last = len(tokens) - 1
        lengths = np.arange(every, last + 1, every)
        if last % every:
            lengths = np.append(lengths, last)
        parts["stream"].append(np.full(len(lengths), stream))
        parts["input_length"].append(lengths)
        parts["number"].append(before + lengths)
        parts["token"].append(tokens.numpy()[lengths])
        before += last
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _without_left(csv: Path, rows: Rows, due: dict[str, np.ndarray]) -> Rows:
    """``rows`` without a last one that an unbroken run would not have written: where it was broken off."""
    n = len(rows)
    if not n or n > len(due["number"]) or rows.frame["input_length"].iloc[-1] >= due["input_length"][n - 1]:
        return rows
    size = read_bytes(csv)[: rows.size - 1].rfind(b"\n") + 1
    return Rows(rows.frame.iloc[:-1], size)


def _checked_sum(csv: Path, found: Rows, due: dict[str, np.ndarray], every: int) -> float:
    """The sum of the NLLs; every row must be one that this run would have written."""
    frame, count, asked = found.frame, len(found), len(due["number"])
    if count > asked:
        raise UserError(f"cannot go on with {csv}: it has {count} rows, more than the {asked} asked for")
    rows = {name: frame[name].to_numpy() for name in frame}
    number = due["number"][:count]
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.cumsum(rows["nll"])
        right = (rows["input_length"] == due["input_length"][:count]) & ~np.isneginf(rows["nll"])  # one may overflow
        right &= np.isclose(rows["ppl"], np.exp(rows["nll"]), rtol=SLACK, atol=0, equal_nan=True)
        if every == 1:
            right &= np.isclose(rows["overall_ppl"], np.exp(sums / number), rtol=SLACK, atol=0, equal_nan=True)
        right &= np.isfinite(rows["kv_cache_bytes"]) & np.isfinite(rows["token"])
        if "stream" in rows:
            right &= rows["stream"] == due["stream"][:count]
    same = rows["token"] == due["token"][:count]
    wrong = np.flatnonzero(~(right & same))
    if len(wrong):
        what = "is of another text" if right[wrong[0]] else "is damaged"
        raise UserError(f"cannot go on with {csv}: line {wrong[0] + 2} {what}; {BEGIN_ANEW}")
    return float(sums[-1]) if every == 1 else _sum_of_last(csv, found.size, int(number[-1]))


def _sum_of_last(csv: Path, size: int, rows: int) -> float:
    """The sum that the last row says, to the bit: what reads whole tables rounds."""
    line = read_bytes(csv)[:size].rstrip().rpartition(b"\n")[2]
    return sum_behind(float(line.split(b",")[BASE_COLUMNS.index("overall_ppl")]), rows)
