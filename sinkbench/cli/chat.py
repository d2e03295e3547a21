"""``sinkbench chat``: a conversation of any length in constant memory."""

import sys
import warnings
from typing import TYPE_CHECKING, Any

import typer

from sinkbench.cli.generate import show
from sinkbench.cli.options import configured, takes
from sinkbench.config import ChatConfig
from sinkbench.signals import check
from sinkbench.strategies.registry import chosen_by

if TYPE_CHECKING:
    from sinkbench.api.chat import Chat

TALK_COMMANDS = "/stats shows cache and memory, /reset begins anew, /quit ends"


@takes(ChatConfig)
def chat(given: dict[str, Any]) -> None:
    """Talk with an instruct model; /stats, /reset and /quit are commands.

    Without a terminal, each line of standard input is one message.
    """
    wanted = configured(ChatConfig, given)
    chosen = chosen_by(wanted)
    warnings.filterwarnings("ignore", module="transformers|torch")
    from sinkbench.api.chat import Chat
    from sinkbench.api.decoding import Sampling
    from sinkbench.models.loading import check_format, load_model, load_tokenizer, locate
    from sinkbench.models.sizes import layer_sizes

    checkpoint = locate(wanted.model)
    check_format(chosen, checkpoint)
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    plan = chosen.plan(layer_sizes(model.config))
    sampling = Sampling(wanted.temperature, wanted.top_p)
    partner = Chat(model, tokenizer, plan, sampling, wanted.seed, wanted.system)
    _talk(partner, wanted.max_new_tokens, sys.stdin.isatty())


def _talk(partner: "Chat", max_new_tokens: int, prompted: bool) -> None:
    """Messages in, answers out, until ``/quit`` or the end of the input."""
    if prompted:
        typer.echo(TALK_COMMANDS)
    while True:
        check()
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
            typer.echo(f"no command {message.split()[0]}: {TALK_COMMANDS}")
        elif message:
            for piece in partner.say(message, max_new_tokens):
                check()
                show(piece)
            show("\n")
