"""The trace of a run (``--trace``): which token was held for how long, in a file beside the rows.

A trace covers exactly the rows that it lies beside: whoever adds rows removes it first
(:meth:`sinkbench.runs.writer.RowWriter.begin`), and it is written anew when they end.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sinkbench.cache.trace import Trace
from sinkbench.config import RunConfig
from sinkbench.errors import UserError
from sinkbench.results.traces import tokens_in, trace_of, write_trace
from sinkbench.runs.writer import RowWriter
from sinkbench.strategies import Chosen, Plan

NOTHING = "no cache is carried, so there is nothing to trace"


def lacks_trace(config: RunConfig, chosen: Chosen, csv: Path, rows: int) -> bool:
    """Whether ``config`` asks for a trace that is not beside the ``rows`` of ``csv``, and could be."""
    carries_cache = chosen.strategy.context(chosen.window) is None
    return config.trace and carries_cache and tokens_in(trace_of(csv)) != rows


def begun_trace(config: RunConfig, plan: Plan, note: Callable[[str], None]) -> Trace | None:
    """What takes note for the run of ``config``; ``None`` where it asks for no trace, or there is nothing to note."""
    if config.trace and plan.context is not None:
        note(NOTHING)
        return None
    return Trace(plan) if config.trace else None


def keep_trace(trace: Trace, chosen: Chosen, writer: RowWriter, error: BaseException | None) -> BaseException | None:
    """Write what was noted while the rows of ``writer`` were; ``error`` is what ended them, or ``None``.

    The answer is ``error``; without one, what kept the trace from being written.
    """
    try:
        write_trace(trace_of(writer.path), trace.lifetimes(chosen.name, writer.rows))
    except (UserError, RuntimeError) as caught:  # a device that has failed answers no more
        return error or caught
    return error


def traced(csv: Path, rows: int) -> dict[str, Any]:
    """What a record says of the trace beside the ``rows`` of ``csv``."""
    path = trace_of(csv)
    return {"trace": path.name} if rows and tokens_in(path) == rows else {}
