"""Folders that are made for a file, and go again where there comes to be none."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def make_folder(folder: Path) -> list[Path]:
    """Make ``folder`` where there is none; those that were made for it, the outermost first.

    Raises:
        OSError: it cannot be made; then none is left.
    """
    made: list[Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.is_dir():
                place.mkdir(exist_ok=True)
                made.append(place)
    except OSError:
        remove_empty(made)
        raise
    return made


def remove_empty(made: Sequence[Path]) -> None:
    """Remove what :func:`make_folder` made, as far as nothing is in it."""
    with suppress(OSError):
        for place in reversed(made):
            place.rmdir()
