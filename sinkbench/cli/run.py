"""``sinkbench run``: one strategy over one stream."""

import warnings
from pathlib import Path
from typing import Any

import typer

from sinkbench.cli.options import ConfigPath, configured, takes
from sinkbench.cli.status import status_of
from sinkbench.config import RunConfig
from sinkbench.errors import UserError
from sinkbench.strategies.naming import named


@takes(RunConfig)
def run(given: dict[str, Any], config: ConfigPath = None) -> None:
    """Run one strategy over a stream of tokens; write its CSV and JSON."""
    wanted = _wanted(given) if config is None else _wanted_with(config, given)
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.cli.progress import Progress, closing_table
    from sinkbench.runs import run as runs  # torch and transformers take seconds to import; --help should not

    with Progress(wanted) as progress:
        result = runs.run(wanted, progress.watch, note=progress.note)
    closing_table(wanted, result)
    status = status_of(result.exit_reason)
    if status:
        raise typer.Exit(status)


def _wanted(given: dict[str, Any]) -> RunConfig:
    return named(configured(RunConfig, given))


def _wanted_with(file: Path, given: dict[str, Any]) -> RunConfig:
    """The run that a line and a file ask for."""
    from sinkbench.sweeps.experiment import read_options

    given = read_options(file, given)
    try:
        return _wanted(given)
    except UserError as error:
        raise UserError(f"{error} (with the options of {file})") from error
