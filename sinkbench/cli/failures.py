"""How a command fails: one line on standard error, and a status that says whose fault it was."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

import typer

from sinkbench.errors import UserError, out_of_memory

MENDABLE = 2  # what the user can mend
CLOSED = 1  # whoever read the output has gone, as after `| head`
FULL = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT)  # what writing to a stream may raise
# what the system may say of any name, wherever it is looked at
OF_FILES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS, *FULL)
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h: a fault of the program


class Unwritable(Exception):
    """Standard output takes no more; the argument is the error of the system."""


@contextmanager
def explained(debug: bool) -> Iterator[None]:
    """Whatever is raised within this context ends the process with one line; with ``debug`` it is raised as it is."""
    try:
        with _written_to(sys.stdout):
            yield
    except Unwritable as error:
        if debug:
            raise
        _discard_output()
        cause = error.args[0]
        if isinstance(cause, BrokenPipeError):
            raise SystemExit(CLOSED) from None
        _fail(f"cannot write to standard output: {cause.strerror or cause}")
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except typer.Abort:
        _fail("aborted")
    except Exception as error:
        if debug:
            raise
        # what the parser refuses carries its own message
        if hasattr(error, "format_message"):
            message = error.format_message().replace("Value error, ", "").rstrip(".")
            _fail(f"{message} (see sinkbench --help)")
        if isinstance(error, OSError) and error.filename is not None and error.errno in OF_FILES:
            _fail(f"{shortened(error.filename)}: {error.strerror}: give another name, or mend what is there")
        starved = out_of_memory(error)
        if starved is not None:
            _fail(str(starved))
        kind, text = type(error).__name__, shortened(error)
        _fail(
            f"unexpected {kind}{f': {text}' if text else ''}; this is a fault of sinkbench, please report it with "
            "the command and with what --debug, added to it, shows",
            UNEXPECTED,
        )


@contextmanager
def _written_to(stream: TextIO | None) -> Iterator[None]:
    """Characters that ``stream`` cannot encode are escaped within this context, and it is flushed at its end.

    Raises:
        Unwritable: it takes no more.
    """
    before = getattr(stream, "errors", None)
    reconfigure = getattr(stream, "reconfigure", None) or (lambda errors: None)
    reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            if stream is not None:  # otherwise it would be flushed, and fail, when the interpreter ends
                _flushed(stream)
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # of a file, it would have been explained
            raise Unwritable(error) from error
        raise
    finally:
        with suppress(OSError):
            reconfigure(errors=before or "strict")


def _flushed(stream: TextIO) -> None:
    try:
        stream.flush()
    except OSError as error:
        raise Unwritable(error) from error


def _discard_output() -> None:
    """What is left to be written goes nowhere, so that the end of the interpreter does not try again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def shortened(error: object, length: int = 300) -> str:
    """The text of an error in one line of at most ``length`` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def _fail(message: str, status: int = MENDABLE) -> None:
    with suppress(OSError):  # standard error may take no more either; the status says it
        print(f"sinkbench: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)
