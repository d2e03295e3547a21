"""The command line: thin, one module a command."""

import sys
from collections.abc import Iterable

import typer

from sinkbench.cli.chat import chat
from sinkbench.cli.compare import compare
from sinkbench.cli.doctor import doctor
from sinkbench.cli.failures import explained
from sinkbench.cli.generate import generate
from sinkbench.cli.plot import plot
from sinkbench.cli.report import report
from sinkbench.cli.run import run
from sinkbench.cli.speed import speed
from sinkbench.cli.status import interruptible
from sinkbench.cli.strategies import strategies
from sinkbench.cli.sweep import sweep
from sinkbench.errors import UserError
from sinkbench.validation import writable

# options that take several values after one flag
MANY_VALUES = {
    "plot": {"--features"},
    "speed": {"--num-tokens", "--strategies", "--streams"},
    "run": {"--set"},
    "generate": {"--set"},
    "chat": {"--set"},
}

app = typer.Typer(
    help="What does a language model lose, and what does it cost, when its KV cache is cut?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Errors are one line; --debug, anywhere on the line, shows where they come from.",
)
app.command()(run)
app.command()(sweep)
app.command()(strategies)
app.command()(generate)
app.command()(chat)
app.command()(plot)
app.command()(compare)
app.command()(report)
app.command()(speed)
app.command()(doctor)


def _version(value: bool) -> None:
    if value:
        from sinkbench import __version__

        typer.echo(f"sinkbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    pass


def spelled(arguments: Iterable[str]) -> list[str]:
    """Arguments as typer wants them: ``-`` for ``_`` in option names, a flag before each of several values."""
    out: list[str] = []
    many: str | None = None
    fresh = False
    arguments = list(arguments)
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    takes_many = MANY_VALUES.get(command, set())
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name.replace("_", "-")
            many, fresh = (name, True) if name in takes_many else (None, False)
            out.append(name + equals + value)
            fresh = fresh and not equals
        elif argument.startswith("-") and len(argument) > 1:
            many = None
            out.append(argument)
        else:
            if many and not fresh:
                out.append(many)
            out.append(argument)
            fresh = False
    return out


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend is one line and exit status 2 (:mod:`sinkbench.cli.failures`)."""
    arguments = spelled(sys.argv[1:] if arguments is None else arguments)
    given = [argument for argument in arguments if argument != "--debug"]
    with explained(debug="--debug" in arguments):
        _check_encoding(arguments)
        status = interruptible(lambda: app(given, prog_name="sinkbench", standalone_mode=False))
    if isinstance(status, int) and status:
        raise SystemExit(status)


def _check_encoding(arguments: Iterable[str]) -> None:
    """Refuse arguments that are no text: no file that says what they were could be written in UTF-8."""
    for argument in arguments:
        try:
            writable(argument)
        except ValueError as error:
            raise UserError(f"{argument!r} is not UTF-8: give names and texts in that encoding") from error
