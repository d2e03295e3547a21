"""Files that are written whole or not at all: to a part beside them, which then takes their name."""

import errno
import fcntl
import json
import math
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from sinkbench.errors import UserError


def replace_file(
    path: Path, data: bytes, ready: Callable[[], None] = lambda: None, folder: bool = False, advice: str = ""
) -> None:
    """Let ``data`` be all that ``path`` holds, or leave what is there as it is.

    A link stays a link, to a new file. What does not come to its end leaves nothing behind, unless it is killed: the
    part is then taken over by whoever writes next.

    Args:
        ready: is called when ``data`` is on the disk and about to get its name.
        folder: whether to make its folder where there is none.
        advice: what to do, said behind what is wrong.

    Raises:
        UserError: it cannot be written, or another process is writing it.
    """
    try:
        place = Path(os.path.realpath(path))
        if folder:
            place.parent.mkdir(parents=True, exist_ok=True)
        _replace(place, place.with_name(f".{place.name}.part"), data, ready)
    except BlockingIOError as error:
        raise UserError(f"cannot write {path}: another process is writing it{advice}") from error
    except (OSError, ValueError) as error:  # a name with a null character is none
        reason = getattr(error, "strerror", None) or error
        part = error.filename if isinstance(error, OSError) and str(error.filename).endswith(".part") else None
        where = f" ({Path(part).name} is in the way: remove it)" if part and os.path.lexists(part) else ""
        raise UserError(f"cannot write {path}: {reason}{where}{advice}") from error


def _replace(place: Path, part: Path, data: bytes, ready: Callable[[], None]) -> None:
    if place.is_dir():  # before anything is ready
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with _held(part) as file:
        try:
            left = memoryview(data)
            while left:
                left = left[file.write(left) or 0 :]
            ready()
            os.replace(part, place)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def _held(part: Path) -> FileIO:
    """The part, empty and locked, which nothing but a file can be: no link is followed, and no pipe is waited for."""
    while True:
        number = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        file = FileIO(number, "wb")
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise OSError(errno.EINVAL, "it is a pipe or a device", str(part))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(part, file):  # otherwise whoever held the lock has just given it its name
                file.truncate(0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def is_at(path: Path, file: FileIO) -> bool:
    """Whether ``path`` is the name of the open ``file``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def encodable(text: str) -> str:
    """``text`` with half characters, such as come from names that are no UTF-8, spelled out."""
    return text.encode(errors="backslashreplace").decode()


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as every reader takes it: numbers that are none are null; ASCII, and a line break at the end."""
    return json.dumps(_known(value), indent=indent, default=str, allow_nan=False) + "\n"


def _known(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _known(item) for key, item in value.items()}
    return [_known(item) for item in value] if isinstance(value, list | tuple) else value
