"""Options that several commands share."""

from enum import StrEnum
from typing import Annotated

import typer

MODEL, STRATEGY, OUTPUT = "Model", "Strategy", "Output"  # panels of --help


class Experiment(StrEnum):
    """The strategies."""

    attention_sinks = "attention_sinks"
    transformers = "transformers"
    windowed = "windowed"
    recompute = "recompute"


class Dtype(StrEnum):
    """The types of weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


WindowSize = Annotated[
    int, typer.Option(min=1, metavar="N", help="Cache entries kept between steps.", rich_help_panel=STRATEGY)
]
SinkSize = Annotated[
    int, typer.Option(min=0, metavar="N", help="How many of them are the first tokens.", rich_help_panel=STRATEGY)
]
ModelName = Annotated[
    str,
    typer.Option(metavar="NAME", help="Hub id, folder, .gguf file, or smollm2-135m (embedded).", rich_help_panel=MODEL),
]
Revision = Annotated[str, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.", rich_help_panel=MODEL)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model brings.", rich_help_panel=MODEL)
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pickled weights where there are no others.", rich_help_panel=MODEL),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(metavar="MAP", help="As in transformers; auto spreads over GPUs.", rich_help_panel=MODEL),
]
