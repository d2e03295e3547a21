"""``sinkbench speed``: what a token costs on this device."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from sinkbench import embedded
from sinkbench.cli.options import Dtype
from sinkbench.errors import UserError

if TYPE_CHECKING:
    from sinkbench.speed import Cost


def speed(
    model_name_or_path: Annotated[
        str, typer.Option(metavar="NAME", help="Hub id, folder, .gguf, config.json (random weights), or embedded.")
    ] = embedded.MODEL,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Random weights.")] = False,
    dtype: Annotated[Dtype, typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.")] = Dtype.auto,
    window_size: Annotated[int, typer.Option(min=2, metavar="N", help="Cache entries kept.")] = 1024,
    attention_sink_size: Annotated[int, typer.Option(min=0, metavar="N", help="Sinks among them.")] = 4,
    steps: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens timed one by one.")] = 200,
    num_tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens read in parallel.")] = 8192,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="A .json or .md file to write too.")] = None,
) -> None:
    """Time the seed's loop and both engines; print them beside the floors of this device."""
    from sinkbench.models import ModelSource, load_model
    from sinkbench.records import device_name, versions
    from sinkbench.speed import measure

    if output is not None and output.suffix not in (".json", ".md"):
        raise UserError(f"cannot write {output}: give a .json or .md file")
    source = ModelSource(model_name_or_path, dtype=str(dtype), random_weights=random_weights)
    model = load_model(source)
    console = Console(stderr=True)
    with console.status("measuring") as status:
        costs = measure(model, window_size, attention_sink_size, steps, num_tokens, status.update)
    Console().print(table(costs))
    if output is None:
        return
    about = {"model": model_name_or_path, "device": device_name(), "dtype": str(model.dtype), "window": window_size}
    text = json.dumps({**about, "versions": versions(), "costs": [asdict(c) for c in costs]}, indent=2)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n" if output.suffix == ".json" else markdown(costs, about), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _rows(costs: "list[Cost]") -> list[tuple[str, str, str, str]]:
    seed = next(cost.ms for cost in costs if cost.what.startswith("the seed"))
    return [
        (cost.what, f"{cost.ms:.4f}", "-" if cost.p99 is None else f"{cost.p99:.4f}", f"{seed / cost.ms:.1f}")
        for cost in costs
    ]


HEADINGS = ("", "ms a token", "p99", "times the seed's speed")


def table(costs: "list[Cost]") -> Table:
    """The costs, for a terminal."""
    shown = Table(*HEADINGS)
    for row in _rows(costs):
        shown.add_row(*row)
    return shown


def markdown(costs: "list[Cost]", about: dict[str, object]) -> str:
    """The costs, for a page."""
    lines = [", ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---|---|---|---|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in _rows(costs))]) + "\n"
