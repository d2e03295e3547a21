"""``sinkbench generate``: endless text under a strategy, and how fluent it stays."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

import typer

from sinkbench.cli.options import configured, takes
from sinkbench.cli.status import status_of
from sinkbench.config import GenerateConfig
from sinkbench.strategies.naming import named

if TYPE_CHECKING:
    from sinkbench.api.generation import Written


@takes(GenerateConfig)
def generate(given: dict[str, Any]) -> None:
    """Write text without end under one strategy; measure how long it stays fluent."""
    wanted = named(configured(GenerateConfig, given))
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.api import generation

    written = generation.generate(wanted, show)
    show("\n")
    _report(wanted, written)
    status = status_of(written.exit_reason)
    if status:
        raise typer.Exit(status)


def show(text: str) -> None:
    """Write a piece of text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(options: GenerateConfig, written: "Written") -> None:
    """The closing lines, apart from the text."""
    from statistics import mean

    count = len(written.said)
    if count:
        rate = count / written.seconds
        typer.echo(f"{written.exit_reason}: {count:,} tokens, {rate:.1f} a second", err=True)
        last = mean(written.fresh[-256:])
        typer.echo(f"NLL with fresh context: {mean(written.fresh[:256]):.2f} at first, {last:.2f} at last", err=True)
        typer.echo(f"KV cache: {max(s.kv_cache_bytes for s in written.said) / 2**20:.1f} MiB at most", err=True)
        typer.echo(f"rows: {options.csv}", err=True)
