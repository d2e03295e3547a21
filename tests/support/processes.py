"""The command line in processes of their own: forked, so that seconds of imports are behind them."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from sinkbench.cli import main

PATIENCE = 60  # seconds after which a test gives up


def begun(command: Sequence[Any], output: str | Path = os.devnull, before: Callable[[], Any] = lambda: None) -> int:
    """Carry out ``command`` in a process of its own, which writes to ``output`` and does ``before`` first; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        tqdm.set_lock(RLock())  # that of a thread of the parent might never be released here
        sys.stdout = sys.stderr = Path(output).open("w", buffering=1)  # noqa: SIM115 - as long as the process
        before()
        main([str(argument) for argument in command])
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        os._exit(status)


def ended(child: int, patience: float = PATIENCE) -> int:
    """The exit status of ``child``, which ends within ``patience``: negative where a signal ended it."""
    deadline = time.monotonic() + patience
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            kill(child)
            raise AssertionError(f"it had not ended after {patience} s")
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(found[1])


def running(child: int) -> bool:
    """Whether ``child`` has not ended; to be asked before :func:`ended`."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def kill(child: int) -> None:
    """End ``child`` where it stands."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def killed(command: Sequence[Any], seconds: float) -> bool:
    """Carry out ``command``, killed after so many seconds; whether it came to its end before, which is a success."""
    child = begun(command)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not running(child):
            assert ended(child) == 0
            return True
        time.sleep(0.0005)
    kill(child)
    return False


def finished(command: Sequence[Any]) -> None:
    """Carry out ``command`` to its end, which is a success."""
    assert ended(begun(command)) == 0


def size(csv: Path) -> int:
    return csv.stat().st_size if csv.exists() else 0


def await_rows(csv: Path, child: int, more_than: int = 0) -> None:
    """Wait until ``csv`` has more bytes than that, which ``child`` is writing."""
    deadline = time.monotonic() + PATIENCE
    while size(csv) <= more_than:
        assert running(child), "it ended without a row"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def stream_of(path: Path, tokens: int) -> Path:
    """A file with a stream of so many tokens, in the column ``input_ids``."""
    path.write_text(json.dumps({"input_ids": [i * 7 % 500 for i in range(tokens)]}) + "\n")
    return path
