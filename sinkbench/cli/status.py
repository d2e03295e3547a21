"""Exit statuses: how a process says what ended its work."""

from collections.abc import Iterator
from contextlib import contextmanager

from sinkbench.runs.signals import Interrupted, signals

STATUSES = {"SIGINT": 130, "SIGTERM": 143}  # 128 and the signal's number, as shells have it


def status_of(exit_reason: str) -> int:
    """The exit status for a run that ended so: 0 unless a signal ended it."""
    return next((status for name, status in STATUSES.items() if f"interrupted ({name})" == exit_reason), 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context SIGINT and SIGTERM end the process with their status, also while it imports and loads."""
    try:
        with signals():
            yield
    except Interrupted as interrupted:
        raise SystemExit(status_of(interrupted.reason)) from None
