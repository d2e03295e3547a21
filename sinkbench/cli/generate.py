"""``sinkbench generate``: endless text under a strategy, and how fluent it stays."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.options import (
    MODEL,
    OUTPUT,
    STRATEGY,
    AllowPickle,
    DeviceMap,
    Dtype,
    Experiment,
    ModelName,
    Revision,
    SinkSize,
    TrustRemoteCode,
    WindowSize,
)
from sinkbench.models import embedded

if TYPE_CHECKING:
    from sinkbench.api.generation import GenerateOptions, Written

TEXT = "Text"
PROMPT = "Once upon a time, in a small village by the sea, there lived"


def generate(
    experiment: Annotated[
        Experiment,
        typer.Option(
            metavar="NAME", help="attention_sinks, transformers, windowed or recompute.", rich_help_panel=STRATEGY
        ),
    ] = Experiment.attention_sinks,
    window_size: WindowSize = 1024,
    attention_sink_size: SinkSize = 4,
    model_name_or_path: ModelName = embedded.MODEL,
    revision: Revision = "main",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    dtype: Annotated[
        Dtype,
        typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16.", rich_help_panel=MODEL),
    ] = Dtype.auto,
    device_map: DeviceMap = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the text begins with.", rich_help_panel=TEXT)
    ] = PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to write; none ends the text.", rich_help_panel=TEXT)
    ] = 2000,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.", rich_help_panel=TEXT)
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Share of the likeliest tokens.", rich_help_panel=TEXT)
    ] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling.", rich_help_panel=TEXT)] = 0,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where generate_<experiment>.csv goes.", rich_help_panel=OUTPUT)
    ] = Path("results"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Write text without end under one strategy; measure how long it stays fluent."""
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.api import generation
    from sinkbench.config import ModelSource

    options = generation.GenerateOptions(
        experiment=str(experiment),
        model=ModelSource(
            model_name_or_path, revision, trust_remote_code, str(dtype), device_map, allow_pickle=allow_pickle
        ),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        window_size=window_size,
        attention_sink_size=attention_sink_size,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        output_dir=output_dir,
        overwrite=overwrite,
    )
    written = generation.generate(options, show)
    show("\n")
    _report(options, written)
    if written.interrupted:
        raise typer.Exit(130)


def show(text: str) -> None:
    """Write a piece of text to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(options: "GenerateOptions", written: "Written") -> None:
    """The closing lines, apart from the text."""
    from statistics import mean

    count = len(written.said)
    typer.echo(f"{written.exit_reason}: {count:,} tokens, {count / written.seconds:.1f} a second", err=True)
    if count:
        last = mean(written.fresh[-256:])
        typer.echo(f"NLL with fresh context: {mean(written.fresh[:256]):.2f} at first, {last:.2f} at last", err=True)
        typer.echo(f"KV cache: {max(s.kv_cache_bytes for s in written.said) / 2**20:.1f} MiB at most", err=True)
        typer.echo(f"rows: {options.csv}", err=True)
