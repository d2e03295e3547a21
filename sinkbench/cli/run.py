"""``sinkbench run``: one strategy over one stream."""

import warnings
from pathlib import Path
from typing import Any

import typer

from sinkbench.cli.options import ConfigPath, configured, flag, takes
from sinkbench.cli.status import status_of
from sinkbench.config import RunConfig
from sinkbench.errors import UserError


@takes(RunConfig)
def run(given: dict[str, Any], config: ConfigPath = None) -> None:
    """Run one strategy over a stream of tokens; write its CSV and JSON."""
    wanted = configured(RunConfig, given, _defaults(config, given) if config else None)
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.cli.progress import Progress, report
    from sinkbench.runs import run as runs  # torch and transformers take seconds to import; --help should not

    wanted = runs.named(wanted)
    with Progress(wanted) as progress:
        result = runs.run(wanted, progress.watch, note=progress.note)
    report(wanted, result)
    status = status_of(result.exit_reason)
    if status:
        raise typer.Exit(status)


def _defaults(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options in an experiment file, of which the line has to say those that have several values there."""
    from sinkbench.sweeps.experiment import read_options

    found = read_options(path)
    for key, value in found.items():
        if isinstance(value, list) and key not in given:
            values = ", ".join(map(str, value))
            raise UserError(
                f"{path}: {key}: has several values ({values}): give one with {flag(key)}, "
                "or run them all with `sinkbench sweep`"
            )
    return {key: value for key, value in found.items() if not isinstance(value, list)}
