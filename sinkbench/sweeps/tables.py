"""Files in TOML: their tables, and what is wrong in one said of the file."""

import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sinkbench.errors import UserError
from sinkbench.files import read_text


def table_in(path: Path) -> dict[str, Any]:
    """What a TOML file holds, with words joined by ``_``.

    Raises:
        UserError: it cannot be read, or is not TOML.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8, as TOML must be (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML: {error}") from error
    except (RecursionError, ValueError) as error:  # an integer of more digits than Python reads
        deep = isinstance(error, RecursionError)
        raise UserError(f"{path}: {'is nested too deeply' if deep else 'has a number that is too long'}") from error
    with about(path):
        return spelled(table)


def spelled(table: dict[str, Any]) -> dict[str, Any]:
    """``table`` with words joined by ``_``, also in the tables of parameters within it."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in found:
            raise UserError(f"{name}: is given twice, with - and with _")
        inner = value if isinstance(value, list) else [value]
        tables = [spelled(one) if isinstance(one, dict) and name != "shape" else one for one in inner]
        found[name] = tables if isinstance(value, list) else tables[0]
    return found


@contextmanager
def about(path: Path) -> Iterator[None]:
    """What is wrong within this context is said of a file, with the keys that it has for options of the line."""
    try:
        yield
    except UserError as error:
        line = str(error)
        raise error if line.startswith(f"{path}: ") else UserError(f"{path}: {_keys(line)}") from error


def _keys(line: str) -> str:
    """``line`` with options of the command line as the keys of a file, except where it advises to give one there."""
    line = re.sub(r"--set ([a-z0-9_]+)", r"set.\1", line)
    return re.sub(r"(?<!give one with )--([a-z][a-z0-9-]*)", lambda option: option[1].replace("-", "_"), line)
