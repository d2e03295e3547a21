"""Signals: what is asked to end closes its files first.

A signal raised from its handler can be lost: in a finalizer, or in compiled code that calls back, Python prints it and
goes on. So the handler first notes the signal. :func:`check` looks at the note, between steps, chunks, cells and stages
of loading; the raise from the handler, and again every second, only spares the wait for the next of these.
"""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

ENDING = (signal.SIGINT, signal.SIGTERM)  # the signals that ask a process to end
Answer = TypeVar("Answer")
SPARED = 1.0  # seconds after a raise in which there is no other: what it ends is cleaning up


class Interrupted(BaseException):
    """A signal asked for an end; the argument is the signal's number."""

    @property
    def reason(self) -> str:
        """The exit reason of what it ended."""
        return f"interrupted ({signal.Signals(self.args[0]).name})"


@dataclass
class Watch:
    """What is known of signals.

    Attributes:
        came: the number of the first one.
        raising: whether they are raised, from the handler and by :func:`check`, or noted only.
        answered: whether work has ended since one came; from then on the handler raises nothing.
    """

    came: int | None = None
    raising: bool = False
    answered: bool = False
    _again: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler: note the first signal, and raise it where that is allowed."""
        if self.came is None:
            self.came = number
            with suppress(RuntimeError):  # no more threads: :func:`check` will do
                _thread.start_new_thread(self._remind, ())  # takes no lock that the main thread may hold here
        if self.raising and not self.answered and time.monotonic() >= self._again:
            self._again = time.monotonic() + SPARED
            raise Interrupted(self.came)

    def _remind(self) -> None:
        """Until work has ended, send the signal again: the raise may have been lost."""
        main = threading.main_thread().ident
        while True:
            time.sleep(1.1 * SPARED)
            with self._lock:  # as long as the handler is in place
                if self.answered or self is not _watch or main is None or self.came is None:
                    return
                if self.raising:
                    signal.pthread_kill(main, self.came)

    @property
    def interruption(self) -> Interrupted | None:
        """The signal that came, as an exception."""
        return None if self.came is None else Interrupted(self.came)

    def attempt(self, work: Callable[[], object]) -> BaseException | None:
        """Do ``work``, which signals end; what ended it early, a signal before anything else.

        From then on they are noted only, so that what is open can be closed. Where the work had come to its end when
        the signal came, that is the answer too.
        """
        error: BaseException | None = None
        try:
            try:
                self.raising = True
                check()
                work()
            finally:
                self.raising = False
        except BaseException as caught:  # also what was raised within the lines above
            error = caught
        self.raising = False
        self.answered = self.came is not None
        return self.interruption or error


_watch: Watch | None = None  # a process has one handler for a signal, and so one watch


@contextmanager
def signals() -> Iterator[Watch]:
    """Within this context SIGINT and SIGTERM are noted; :meth:`Watch.attempt` lets them end something.

    Contexts within others share their watch. Python lets only the main thread handle signals: in others none come.
    """
    global _watch  # noqa: PLW0603 - see there
    if threading.current_thread() is not threading.main_thread():
        yield Watch()
        return
    if _watch is not None:
        with _noting(_watch):
            yield _watch
        return
    watch = Watch()
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, watch.handle) for number in heeded}
    _watch = watch
    try:
        with _unseen(watch):
            yield watch
    finally:
        with watch._lock:
            _watch = None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def handed_on(work: Callable[[], Answer]) -> Answer:
    """What ``work()`` answers; a signal ends it, and goes behind it to whoever handled it before.

    So files are closed first, and the caller's own handler then does as it does: Python's raises
    ``KeyboardInterrupt`` at SIGINT, and SIGTERM ends the process, as if nothing had been in between.

    Raises:
        KeyboardInterrupt: a signal has ended the work, and whoever handles it raised nothing.
    """
    answers: list[Answer] = []
    with signals() as watch:
        error = watch.attempt(lambda: answers.append(work()))
    if watch.came is not None and threading.current_thread() is threading.main_thread():
        signal.raise_signal(watch.came)
    if isinstance(error, Interrupted):
        raise KeyboardInterrupt from error
    if error is not None:
        raise error
    return answers[0]


def check() -> None:
    """End here if a signal has come.

    Raises:
        Interrupted: one has, and this is no place where it has to wait.
    """
    if _watch is not None and _watch.raising and _watch.came is not None:
        raise Interrupted(_watch.came)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Signals wait until this context ends, so that no row is cut."""
    if _watch is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _noting(_watch):
        yield
    check()


@contextmanager
def kept() -> Iterator[None]:
    """Within this context no library can have SIGINT and SIGTERM handled in its own way."""
    before = signal.signal

    def install(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in ENDING else before(number, handler)

    signal.signal = install  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = before


@contextmanager
def _noting(watch: Watch) -> Iterator[None]:
    before, watch.raising = watch.raising, False
    try:
        yield
    finally:
        watch.raising = before


@contextmanager
def _unseen(watch: Watch) -> Iterator[None]:
    """What Python prints of exceptions that it cannot raise is of no use once a signal has come: one of them is it."""

    def silenced(hook: Callable[..., Any]) -> Callable[..., None]:
        def call(*about: Any) -> None:
            if watch.came is None:
                hook(*about)

        return call

    before = sys.unraisablehook, sys.excepthook
    sys.unraisablehook, sys.excepthook = map(silenced, before)
    try:
        yield
    finally:
        sys.unraisablehook, sys.excepthook = before
