"""Signals: a run that is asked to end closes its files first."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """A signal asked the run to end; the argument is the signal's number."""

    @property
    def reason(self) -> str:
        """The exit reason of what it ended."""
        return f"interrupted ({signal.Signals(self.args[0]).name})"


ENDING = (signal.SIGINT, signal.SIGTERM)  # the signals that ask a run to end


@contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise :class:`Interrupted` within this context."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that come within this context, which are not raised."""
    came: list[int] = []
    with _handled(lambda number, frame: came.append(number)):
        yield came


@contextmanager
def _handled(by: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = {number: signal.signal(number, by) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until this context ends, so that no row is cut."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
