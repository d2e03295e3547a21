"""``sinkbench speed``: what a token costs on this device."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sinkbench.cli.options import place
from sinkbench.cli.output import Document, Format, FormatOption, show
from sinkbench.config import DTYPES, MODEL
from sinkbench.errors import UserError
from sinkbench.files import check_output
from sinkbench.results.files import encodable, json_text, replace_file
from sinkbench.validation import MOST

if TYPE_CHECKING:
    from sinkbench.diagnostics.speed import Cost
    from sinkbench.results.table import Table as ValueTable


def speed(
    model_name_or_path: Annotated[
        str, typer.Option(metavar="NAME", help="Hub id, folder, .gguf, config.json (random weights), or embedded.")
    ] = MODEL,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Random weights.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pickled weights where there are no others.")
    ] = False,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.")] = "auto",
    window_size: Annotated[int, typer.Option(min=2, max=MOST, metavar="N", help="Cache entries kept.")] = 1024,
    attention_sink_size: Annotated[
        int | None, typer.Option(min=0, max=MOST, metavar="N", help="Sinks among them; by default each strategy's own.")
    ] = None,
    strategies: Annotated[
        list[str], typer.Option(metavar="NAME...", help="What is timed: built in, or FILE.py:CLASS.")
    ] = ["windowed", "attention_sinks"],  # noqa: B006 - typer copies it
    kv_format: Annotated[str, typer.Option(metavar="FORMAT", help="In which their caches are held.")] = "model",
    steps: Annotated[int, typer.Option(min=0, max=MOST, metavar="N", help="Tokens timed one by one; 0: none.")] = 200,
    num_tokens: Annotated[
        list[int], typer.Option(min=2, max=MOST, metavar="N...", help="Lengths of the streams read in parallel.")
    ] = [8192],  # noqa: B006 - typer copies it
    streams: Annotated[
        list[int], typer.Option(min=1, max=MOST, metavar="N...", help="How many of these are read side by side.")
    ] = [1],  # noqa: B006 - typer copies it
    dense_tokens: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, metavar="N", help="Tokens that dense attention holds while it is timed; 0: it is not."
        ),
    ] = 2048,
    output: Annotated[
        Path | None,
        typer.Option(parser=place, metavar="FILE", help="A .json or .md to write too; the other goes beside it."),
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Time the seed's loop and both engines; print them beside the floors of this device."""
    if output is not None and output.suffix not in (".json", ".md"):
        raise UserError(f"cannot write {output}: give a .json or .md file")
    for path in (output.with_suffix(".json"), output.with_suffix(".md")) if output else ():
        check_output(path)
    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)} (got {dtype})")
    if not model_name_or_path:
        raise UserError("--model-name-or-path must be a text that is not empty")
    if attention_sink_size is not None and attention_sink_size >= window_size:
        raise UserError("the window must be larger than the attention sinks: raise --window-size")
    from sinkbench.config import ModelSource
    from sinkbench.diagnostics.speed import Timings, measure
    from sinkbench.models.loading import load_model, locate
    from sinkbench.runs.record import device_name, versions

    source = ModelSource(model_name_or_path, dtype=dtype, random_weights=random_weights, allow_pickle=allow_pickle)
    model = load_model(locate(source))
    lengths, names = sorted(set(num_tokens)), list(dict.fromkeys(strategies))
    several = sorted(set(streams))
    timings = Timings(window_size, attention_sink_size, steps, lengths, dense_tokens, names, kv_format, several)
    console, costs = Console(stderr=True), []
    with console.status("measuring") as status:
        for cost in measure(model, timings, status.update):
            costs.append(cost)
            console.print(f"{cost.what}: {cost.ms:.4g} ms a token")
    about = {"model": model_name_or_path, "device": device_name(), "dtype": str(model.dtype).removeprefix("torch.")}
    about |= {"window": str(window_size), "cache": kv_format, "random weights": str(random_weights)}
    facts = {name.replace(" ", "_"): value for name, value in about.items()}
    show(Document([cost_values(costs)], facts), form, lambda: Console().print(costs_table(costs)))
    if output is None:
        return
    shown = [{"what": c.what, "ms": c.ms, "p99": c.p99, "each": c.each, **asdict(c)} for c in costs]
    text = json_text({**about, "versions": versions(), "costs": shown}, indent=1)
    for suffix, written in ((".json", text), (".md", costs_markdown(costs, about))):
        replace_file(output.with_suffix(suffix), encodable(written).encode(), folder=True)


HEADINGS = (
    *("", "ms a token", "x floor", "first row s", "wall s", "x seed"),
    *("5-95 %", "p99", "peak GiB", "timed"),
)
FITTING = 6  # columns that a narrow terminal has room for


def cost_values(costs: "list[Cost]") -> "ValueTable":
    """The costs, for programs."""
    from sinkbench.results.table import Column, Table

    columns = [
        Column("what", "what"),
        Column("ms", "ms a token", ".5g"),
        Column("low", "5 %", ".5g"),
        Column("high", "95 %", ".5g"),
        Column("p99", "p99", ".5g"),
        Column("times_the_seed", "x the seed", ".1f"),
        Column("floor", "floor", ".5g"),
        Column("first_row_seconds", "first row s", ".2f"),
        Column("wall_seconds", "wall s", ".1f"),
        Column("peak_gib", "peak GiB", ".2f"),
        Column("timed", "timed", ".0f"),
        Column("each", "each"),
    ]
    seed = _seed(costs)
    rows = [
        [
            *(c.what, c.ms, *c.spread, c.p99, seed / c.ms if seed else None, c.floor, c.first_row, c.wall),
            *(c.peak_gib, len(c.timings), c.each),
        ]
        for c in costs
    ]
    return Table("costs", "", columns, [list(row) for row in rows])


def _seed(costs: "list[Cost]") -> float | None:
    return next((cost.ms for cost in costs if cost.what.startswith("the seed")), None)


def _rows(costs: "list[Cost]") -> list[tuple[str, ...]]:
    seed = _seed(costs)
    rows: list[tuple[str, ...]] = []
    for cost in costs:
        digits = 3 if cost.ms >= 0.1 else 5
        low, high = cost.spread
        rows.append(
            (
                cost.what,
                f"{cost.ms:.{digits}f}",
                "-" if cost.floor is None else f"{cost.ms / cost.floor:.2f}",
                "-" if cost.first_row is None else f"{cost.first_row:.2f}",
                "-" if cost.wall is None else f"{cost.wall:.1f}",
                "-" if seed is None else f"{seed / cost.ms:.1f}",
                f"{low:.{digits}f}-{high:.{digits}f}",
                "-" if cost.p99 is None else f"{cost.p99:.{digits}f}",
                "-" if cost.peak_gib is None else f"{cost.peak_gib:.2f}",
                f"{len(cost.timings)} {cost.each}s",
            )
        )
    return rows


def costs_table(costs: "list[Cost]") -> Table:
    """The costs, for a terminal."""
    shown = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, heading in enumerate(HEADINGS[:FITTING]):
        if number:
            shown.add_column(heading, justify="right", no_wrap=True)
        else:
            shown.add_column(heading, min_width=24, overflow="fold")
    for row in _rows(costs):
        shown.add_row(*row[:FITTING])
    return shown


def costs_markdown(costs: "list[Cost]", about: dict[str, str]) -> str:
    """The costs, for a page."""
    lines = [", ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(HEADINGS) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in _rows(costs))]) + "\n"
