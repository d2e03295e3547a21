"""``python -m sinkbench``, and the command that is installed.

A signal that comes while the command line is imported, or when its work is done, ends the process at once: there is
nothing to close. In between, :func:`sinkbench.cli.main` sees to it.
"""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def main() -> None:
    """Carry out the command line, and end the process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    import atexit

    ends: list[object] = []
    atexit.register(_last, ends)  # the first that is registered is the last that is called
    from sinkbench.cli import main as command

    try:
        command()
        ends.append(0)
    except SystemExit as stop:
        ends.append(stop.code)
        if stop.code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            _last(ends)  # whatever a library has still to do may stand where the signal has struck
        raise
    finally:
        _flush()


def _flush() -> bool:
    """Hand on what was printed; whether that could be done."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the interpreter will say so
        return False
    return True


def _last(ends: list[object]) -> None:
    """Leave with the status that is known: behind this the interpreter takes itself apart, deaf to signals."""
    if _flush() and ends and isinstance(ends[0], int):
        os._exit(ends[0])


if __name__ == "__main__":
    main()
