"""The options of a command, as a configuration declares them."""

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel

from sinkbench.config import Option, configured, flag, options_of
from sinkbench.strategies.registry import parse_settings

__all__ = ["ConfigPath", "configured", "flag", "place", "takes"]


def place(name: str) -> Path:
    """The path that a line names; nothing names none, though pathlib takes it for the folder one is in."""
    if not name:
        raise typer.BadParameter("must be a name that is not empty")
    return Path(name)


ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", parser=place, metavar="FILE", help="TOML of options, for all that the line does not say."),
]


def takes(config: type[BaseModel], helps: dict[str, str] | None = None) -> Callable[[Callable], Callable]:
    """A decorator: a command that takes the options of ``config`` as one keyword argument ``given``.

    ``given`` holds what the line says, unchecked, by name; what it does not say is left out. The command's other
    parameters stay, before these.

    Args:
        helps: sentences in place of the declared ones, for commands to which those do not apply.
    """

    def wrap(command: Callable) -> Callable:
        def called(**values: Any) -> Any:
            own = {name: values.pop(name) for name in list(values) if name in mine}
            given = {name: value for name, value in values.items() if value is not None and value != []}
            read = {name: _value(value, config.model_fields[name].annotation) for name, value in given.items()}
            return command(given=read, **own)

        mine = {name: p for name, p in inspect.signature(command).parameters.items() if name != "given"}
        options = options_of(config)
        built = [_parameter(name, option, config, (helps or {}).get(name)) for name, option in options.items()]
        parameters = [*(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in mine.values()), *built]
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined] # what typer looks at
        return called

    return wrap


def _parameter(name: str, option: Option, config: type[BaseModel], text: str | None) -> inspect.Parameter:
    """An option of typer's: a default of its own would hide whether it was given, so that it is only shown."""
    field = config.model_fields[name]
    default = field.get_default(call_default_factory=True)
    is_flag = _takes(field.annotation, bool)
    kind: Any = bool if is_flag else list[str] if _takes(field.annotation, dict) else str
    shown = option.default or (
        "" if default is None or (is_flag and not default) else str(default).lower() if is_flag else str(default)
    )
    names = [flag(name), *([f"--no-{flag(name)[2:]}"] if option.off else [])]
    described = f"{text or option.help} [dim]\\[default: {shown}][/dim]" if shown else text or option.help
    said = typer.Option(
        "/".join(names),
        metavar=None if is_flag else option.metavar,
        help=described,
        rich_help_panel=option.panel,
        show_default=False,
    )
    annotation = Annotated[kind | None, said]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _takes(annotation: Any, kind: type) -> bool:
    """Whether an option that is declared so can be of this type."""
    return kind in (annotation, get_origin(annotation)) or any(_takes(part, kind) for part in get_args(annotation))


def _value(given: Any, annotation: Any) -> Any:
    """What the line says, in the declared type where it can be read so; the configuration refuses what cannot."""
    if isinstance(given, list):
        return parse_settings(given)
    for kind in (int, float) if isinstance(given, str) else ():
        if _takes(annotation, kind):
            with suppress(ValueError):
                return kind(given)
    return given
