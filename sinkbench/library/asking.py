"""From arguments to a configuration: those of a command line, or the keywords of a call."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sinkbench.config import Objects, RunConfig, configured, flag, options_of
from sinkbench.errors import UserError
from sinkbench.strategies.naming import named
from sinkbench.strategies.registry import parse_settings
from sinkbench.validation import nearest

MEANT = {"model": "model_name_or_path", "strategy": "experiment", "dataset": "dataset_name"}


def wanted(given: dict[str, Any], file: Path | None = None) -> RunConfig:
    """The run that ``given`` options ask for, and those of a ``file`` for all that they do not say.

    Raises:
        UserError: one line that names the option.
    """
    if file is None:
        return named(configured(RunConfig, given))
    from sinkbench.sweeps.experiment import read_options

    given = read_options(file, given)
    try:
        return named(configured(RunConfig, given))
    except UserError as error:
        raise UserError(f"{error} (with the options of {file})") from error


def asked(given: Mapping[str, Any], tokenizer: Any = None, file: str | Path | None = None) -> RunConfig:
    """The run that the keywords of a call ask for, objects among them (:mod:`sinkbench.library.objects`).

    Raises:
        UserError: one line that names the option, as the command line has it.
    """
    _check_names(given)
    options = {name: plain(value) for name, value in given.items()}
    if isinstance(options.get("set"), list | tuple):
        options["set"] = parse_settings(options["set"])
    objects: dict[str, Any] = {"call": called("run", given)}
    if not isinstance(options.get("experiment", ""), str):
        options, objects["strategy"] = _strategy(options)
    if tokenizer is not None or any(
        not isinstance(options.get(name, ""), str) for name in ("model_name_or_path", "dataset_name")
    ):
        from sinkbench.library import objects as of  # torch and transformers take seconds to import

        options, more = of.taken(options, tokenizer)
        objects |= more
    if file is not None and objects.get("strategy") is not None:
        raise UserError("--config and a strategy as an object exclude each other")
    return wanted({**options, "objects": Objects(**objects)}, None if file is None else Path(file))


def _check_names(given: Mapping[str, Any]) -> None:
    known = [*options_of(RunConfig), "name", "tokenizer", "config", "progress"]
    for name in given:
        if name not in known:
            meant = f"; did you mean {MEANT[name]}?" if name in MEANT else nearest(name, known)
            raise UserError(f"{flag(name)} is not known{meant}")


def called(function: str, given: Mapping[str, Any]) -> str:
    """A call in words, for the record."""
    said = ", ".join(f"{name}={_shortly(value)}" for name, value in given.items())
    return f"sinkbench.{function}({said})"


def _shortly(value: Any) -> str:
    known = isinstance(value, str | int | float | bool | os.PathLike | None)
    return repr(os.fspath(value) if isinstance(value, os.PathLike) else value) if known else f"<{type(value).__name__}>"


def plain(value: Any) -> Any:
    """``value`` as a line has it: paths as texts, numbers of NumPy as numbers, types of torch by name."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    return value


def _strategy(options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """``options`` with the name and the parameters of a strategy as an object, and it.

    What is none stays for the configuration to refuse.
    """
    from sinkbench.strategies.base import Strategy
    from sinkbench.strategies.registry import find

    given, own = options["experiment"], {}
    if isinstance(given, Strategy):
        own = {name: getattr(given, name) for name in given.model_fields_set}
    elif not isinstance(given, type):
        if hasattr(given, "policy") or hasattr(given, "score"):
            find(given)  # which says what it lacks
        return options, None
    settings = options.get("set", {})
    merged = {**own, **settings} if isinstance(settings, dict) else settings
    return {**options, "experiment": find(given).name, "set": merged}, given


def signature(config: type[BaseModel], more: list[inspect.Parameter]) -> inspect.Signature:
    """The options of ``config`` as keywords with their defaults, and ``more`` behind them."""
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=config.model_fields[name].get_default(call_default_factory=True),
        )
        for name in options_of(config)
    ]
    return inspect.Signature([*parameters, *more])


def described(config: type[BaseModel]) -> str:
    """The options of ``config``, a line each, as a docstring has them."""
    return "\n        ".join(f"{name}: {option.help}" for name, option in options_of(config).items())
