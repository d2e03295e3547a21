"""``sinkbench run``: one strategy over one stream."""

import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
from sinkbench.errors import UserError
from sinkbench.models import embedded


class Engine(StrEnum):
    """The engines."""

    stepwise = "stepwise"
    parallel = "parallel"


DATA, SPEED = "Dataset", "How to run"


def _defaults_from(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the options in a TOML file stand where the command line is silent."""
    if path is None:
        return None
    from sinkbench.sweeps.experiment import read_options

    given = {key: _only(path, key, value) for key, value in read_options(path).items()}
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


def _only(path: Path, key: str, value: Any) -> Any:
    """A value as a default; several as one that is refused when it comes to be needed."""
    if not isinstance(value, list):
        return value

    def refuse() -> None:
        values = ", ".join(map(str, value))
        raise UserError(
            f"{path}: {key}: has several values ({values}): give one with --{key.replace('_', '-')}, "
            "or run them all with `sinkbench sweep`"
        )

    return refuse


def run(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            callback=_defaults_from,
            is_eager=True,
            help="TOML of options, for all that the line does not say.",
        ),
    ] = None,
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
        typer.Option(
            metavar="TYPE",
            help="auto, float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own on a GPU.",
            rich_help_panel=MODEL,
        ),
    ] = Dtype.auto,
    device_map: DeviceMap = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Random weights; the model may be a config.json.", rich_help_panel=MODEL),
    ] = False,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="NF4 weights (bitsandbytes).", rich_help_panel=MODEL)
    ] = False,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="8-bit weights (bitsandbytes).", rich_help_panel=MODEL)
    ] = False,
    dataset_name: Annotated[
        str, typer.Option(metavar="NAME", help="Hub id, file, folder, or kjv (embedded).", rich_help_panel=DATA)
    ] = embedded.TEXT,
    dataset_revision: Annotated[
        str, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.", rich_help_panel=DATA)
    ] = "main",
    streaming: Annotated[
        bool,
        typer.Option(help="Read rows as needed; otherwise keep the whole split, for offline.", rich_help_panel=DATA),
    ] = True,
    data_column: Annotated[
        str, typer.Option(metavar="NAME", help="Column of text, or of lists of token ids.", rich_help_panel=DATA)
    ] = "text",
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="Configuration of the dataset.", rich_help_panel=DATA)
    ] = None,
    split: Annotated[str, typer.Option(metavar="NAME", help="Split of the dataset.", rich_help_panel=DATA)] = "test",
    num_samples: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows to read, as one stream.", rich_help_panel=DATA)
    ] = 1,
    num_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to predict.", rich_help_panel=DATA)
    ] = 8192,
    output_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Where <experiment>.csv and .json go.", rich_help_panel=OUTPUT)
    ] = Path("results"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=OUTPUT)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on behind the last row of a run cut short.", rich_help_panel=OUTPUT)
    ] = False,
    engine: Annotated[
        Engine,
        typer.Option(
            metavar="NAME",
            help="stepwise: token by token; parallel: many tokens a forward, the same NLLs.",
            rich_help_panel=SPEED,
        ),
    ] = Engine.stepwise,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens a forward (parallel engine).", rich_help_panel=SPEED)
    ] = None,
    cuda_graphs: Annotated[
        bool,
        typer.Option(help="Capture steps on CUDA where the model allows it.", rich_help_panel=SPEED),
    ] = True,
) -> None:
    """Run one strategy over a stream of tokens; write its CSV and JSON."""
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.cli.progress import Progress, report
    from sinkbench.config import ModelSource, RunOptions, Source
    from sinkbench.runs import run as runs

    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other")
    if load_in_4bit and load_in_8bit:
        raise UserError("--load-in-4bit and --load-in-8bit exclude each other")
    bits = "4bit" if load_in_4bit else "8bit" if load_in_8bit else None
    model = ModelSource(
        model_name_or_path, revision, trust_remote_code, str(dtype), device_map, random_weights, bits, allow_pickle
    )
    options = RunOptions(
        experiment=str(experiment),
        model=model,
        source=Source(dataset_name, data_column, task, split, num_samples, dataset_revision, streaming),
        num_tokens=num_tokens,
        window_size=window_size,
        attention_sink_size=attention_sink_size,
        engine=str(engine),
        chunk_size=chunk_size,
        cuda_graphs=cuda_graphs,
        output_dir=output_dir,
        overwrite=overwrite,
        resume=resume,
    )
    with Progress(options) as progress:
        result = runs.run(options, progress.watch)
    report(options, result)
    if result.interrupted:
        raise typer.Exit(143 if "SIGTERM" in result.exit_reason else 130)
