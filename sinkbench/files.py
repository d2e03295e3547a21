"""Files that somebody named, read whole: what is no file is refused and never waited for.

Whatever is wrong is an :class:`OSError` or a :class:`ValueError`, so that a reader has two things to explain.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from sinkbench.errors import UserError

SPECIAL = "it is a pipe, a socket or a device, and no file"
DEEP = 500  # levels that whatever reads JSON can bear


def check_file(path: Path) -> None:
    """Refuse what is there and no file: a named pipe would be waited for, a device may never end.

    Raises:
        OSError: it is a directory, a named pipe, a socket or a device, or cannot be looked at.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, SPECIAL, str(path))


def check_output(path: Path) -> None:
    """Refuse to write to what is no file: writing to a pipe would wait for a reader.

    Raises:
        UserError: it is a pipe, a socket or a device.
    """
    if is_special(path):
        raise UserError(f"cannot write {path}: {SPECIAL}; give another --output")


def is_special(path: Path) -> bool:
    """Whether there is something at ``path`` that is neither file nor directory."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        OSError: it cannot be read, or is none.
    """
    try:
        check_file(path)
        return path.read_bytes()
    except ValueError as error:  # a name that no file can have, as one with a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def read_text(path: Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError: it cannot be read, or is none.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_bytes(path).decode()


def read_json(path: Path) -> Any:
    """What a file in JSON holds.

    Raises:
        OSError: it cannot be read, or is none.
        ValueError: it is not JSON in UTF-8.
    """
    return parse_json(read_bytes(path))


def parse_json(data: bytes) -> Any:
    """What JSON in UTF-8 says.

    Raises:
        ValueError: it is none, or more than can be counted with or written again: nested too deeply, integers of
            more than 20 digits, halves of characters.
    """
    text = data.decode()
    try:
        found = json.loads(text, parse_int=_integer)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return found


def is_too_deep(data: bytes) -> bool:
    """Whether JSON, or a line of it, nests lists and tables too deeply to be read."""
    if data.count(b"[") + data.count(b"{") < DEEP:
        return False
    try:
        json.loads(data)
    except RecursionError:
        return True
    except ValueError:  # of several lines, or none at all
        lines = data.splitlines()
        return len(lines) > 1 and any(map(is_too_deep, lines))
    return False


def _integer(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)
