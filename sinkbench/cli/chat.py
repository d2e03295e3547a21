"""``sinkbench chat``: a conversation of any length in constant memory."""

import sys
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

from sinkbench.cli.generate import show
from sinkbench.cli.options import (
    MODEL,
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
    from sinkbench.api.chat import Chat

TALK = "Conversation"
COMMANDS = "/stats shows cache and memory, /reset begins anew, /quit ends"


def chat(
    experiment: Annotated[
        Experiment,
        typer.Option(metavar="NAME", help="attention_sinks, transformers or windowed.", rich_help_panel=STRATEGY),
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
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message.", rich_help_panel=TALK)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.", rich_help_panel=TALK)
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.", rich_help_panel=TALK)
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Share of the likeliest tokens.", rich_help_panel=TALK)
    ] = 0.9,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the sampling.", rich_help_panel=TALK)] = 0,
) -> None:
    """Talk with an instruct model; /stats, /reset and /quit are commands.

    Without a terminal, each line of standard input is one message.
    """
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.api.chat import Chat
    from sinkbench.api.decoding import Sampling
    from sinkbench.config import ModelSource
    from sinkbench.models.loading import load_model, load_tokenizer
    from sinkbench.models.sizes import layer_sizes
    from sinkbench.strategies import choose

    chosen = choose(str(experiment), window_size, attention_sink_size)
    source = ModelSource(
        model_name_or_path, revision, trust_remote_code, str(dtype), device_map, allow_pickle=allow_pickle
    )
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    plan = chosen.plan(layer_sizes(model.config))
    partner = Chat(model, tokenizer, plan, Sampling(temperature, top_p), seed, system)
    try:
        _talk(partner, max_new_tokens, sys.stdin.isatty())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _talk(partner: "Chat", max_new_tokens: int, prompted: bool) -> None:
    """Messages in, answers out, until ``/quit`` or the end of the input."""
    if prompted:
        typer.echo(COMMANDS)
    while True:
        try:
            message = input("> " if prompted else "").strip()
        except EOFError:
            return
        if message == "/quit":
            return
        if message == "/reset":
            partner.reset()
            typer.echo("a new conversation")
        elif message == "/stats":
            typer.echo(partner.stats())
        elif message.startswith("/"):
            typer.echo(f"no command {message.split()[0]}: {COMMANDS}")
        elif message:
            for piece in partner.say(message, max_new_tokens):
                show(piece)
            show("\n")
