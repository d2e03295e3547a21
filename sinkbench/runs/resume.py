"""A run taken up where it was broken off: its rows are checked against the stream, and its record goes on."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from sinkbench.errors import UserError
from sinkbench.runs.result import RunResult
from sinkbench.runs.writer import RowWriter, complete_rows, perplexity

GROWS = ("num_tokens", "tokens")  # a run may go on for longer than it was begun for; its tokens are compared one by one
SLACK = 1e-6  # of a perplexity against its NLL: another machine's exp may round otherwise
ELSEWHERE = "give --overwrite to begin anew, or another --output-dir"


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
    if not rows.cells:
        return
    writer.take_up(rows, _checked_sum(writer.path, rows.cells, tokens))
    record |= {name: before.get(name) for name in ("started", "ended", "exit_reason", "resumed_at")}
    if writer.rows < len(tokens) - 1:
        record |= {
            "resumed_at": [*(before.get("resumed_at") or []), writer.rows],
            "exit_reason": "running",
            "ended": None,
        }
    result.rows, result.overall_ppl = writer.rows, writer.perplexity
    result.seconds = before.get("seconds") or 0.0
    result.untimed = max(0, writer.rows - (before.get("timed_rows", before.get("rows")) or 0))
    vram = [float(cells["cuda_vram_allocated"]) for cells in rows.cells if cells["cuda_vram_allocated"]]
    result.peak_vram = max(vram, default=None)
    result.kv_cache_bytes = max(int(cells["kv_cache_bytes"]) for cells in rows.cells)
    result.latency = median(writer.latencies) if writer.latencies else None
    for name in ("model", "dataset", "dtype"):  # of a run that is complete; the others say it anew
        record.setdefault(name, before.get(name))


def _record(csv: Path) -> dict[str, Any]:
    path = csv.with_suffix(".json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"cannot go on with {csv}: its record {path.name} is missing; {ELSEWHERE}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot go on with {csv}: its record {path.name} cannot be read; {ELSEWHERE}") from error
    if not isinstance(record, dict) or not isinstance(record.get("determined_by"), dict):
        raise UserError(f"cannot go on with {csv}: its record does not say what determined it; {ELSEWHERE}")
    return record


def _same_run(csv: Path, before: dict[str, Any], record: dict[str, Any]) -> None:
    was, now = before["determined_by"], record["determined_by"]
    for name in now:
        if name not in GROWS and was.get(name) != now[name]:
            raise UserError(
                f"cannot go on with {csv}: it is of another run, whose {name} was {was.get(name)} and not {now[name]}; "
                + ELSEWHERE
            )


def _checked_sum(csv: Path, cells: list[dict[str, str]], tokens: Tensor) -> float:
    """The sum of the NLLs; every row must be one that this run would have written."""
    if len(cells) > len(tokens) - 1:
        raise UserError(f"cannot go on with {csv}: it has {len(cells)} rows, more than the {len(tokens) - 1} asked for")
    nll_sum = 0.0
    for number, (row, token) in enumerate(zip(cells, tokens[1:].tolist(), strict=False), start=1):
        try:
            nll_sum += (nll := float(row["nll"]))
            right = int(row["input_length"]) == number and math.isfinite(nll)
            right &= math.isclose(float(row["ppl"]), perplexity(nll), rel_tol=SLACK)
            right &= math.isclose(float(row["overall_ppl"]), perplexity(nll_sum / number), rel_tol=SLACK)
            int(row["kv_cache_bytes"]), float(row["latency"] or 0), float(row["cuda_vram_allocated"] or 0)
            same = int(row["token"]) == token
        except ValueError:
            right = False
        if not right:
            raise UserError(f"cannot go on with {csv}: line {number + 1} is damaged; {ELSEWHERE}")
        if not same:
            raise UserError(f"cannot go on with {csv}: line {number + 1} is of another text; {ELSEWHERE}")
    return nll_sum
