"""The record beside a run's rows: how a run may end, and the JSON read back."""

from pathlib import Path
from typing import Any

from sinkbench.errors import UserError
from sinkbench.files import read_json

RUNNING, FINISHED, ENDED, OUT_OF_MEMORY = "running", "finished", "dataset ended", "out of memory"  # exit reasons
SPELLED = "predicted_text"  # tokens, bytes and words of the text that the rows predict


def read_record(path: Path) -> dict[str, Any] | None:
    """A run's JSON; ``None`` where it is JSON of something else than an object.

    Raises:
        UserError: it cannot be read.
    """
    try:
        record = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): run that experiment again, or remove the file") from error
    return record if isinstance(record, dict) else None
