"""``sinkbench run``: one strategy over one stream."""

import warnings
from typing import Any

import typer

from sinkbench.cli.options import ConfigPath, takes
from sinkbench.cli.status import status_of
from sinkbench.config import RunConfig
from sinkbench.library.asking import wanted


@takes(RunConfig)
def run(given: dict[str, Any], config: ConfigPath = None) -> None:
    """Run one strategy over a stream of tokens; write its CSV and JSON."""
    chosen = wanted(given, config)
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.library.progress import Progress, closing_table

    with Progress(chosen) as progress:
        from sinkbench.runs import run as runs  # torch and transformers take seconds to import: a line is there before

        result = runs.run(chosen, progress.watch, note=progress.note, stage=progress.stage)
    closing_table(chosen, result)
    status = status_of(result.exit_reason)
    if status:
        raise typer.Exit(status)
