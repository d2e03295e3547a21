"""Exit statuses: how a process says what ended its work."""

from collections.abc import Callable
from typing import TypeVar

from sinkbench.signals import ENDING, Interrupted, signals

Answer = TypeVar("Answer")
STATUSES = {Interrupted(number).reason: 128 + number for number in ENDING}  # as shells have it


def status_of(exit_reason: str) -> int:
    """The exit status for a run that ended so: 0 unless a signal ended it."""
    return STATUSES.get(exit_reason, 0)


def interruptible(command: Callable[[], Answer]) -> Answer:
    """What ``command()`` answers; SIGINT and SIGTERM end it, wherever it is, and the process with their status.

    Raises:
        SystemExit: a signal came, whatever became of the command.
    """
    answers: list[Answer] = []
    with signals() as watch:
        error = watch.attempt(lambda: answers.append(command()))
    if watch.came is not None:
        raise SystemExit(128 + watch.came)
    if error is not None:
        raise error
    return answers[0]
