"""Where strategies come from: built in, entry points of the group ``sinkbench.strategies``, files."""

import importlib.util
import inspect
import math
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from sinkbench.config import POSITIONS, StrategyConfig
from sinkbench.errors import UserError
from sinkbench.files import read_bytes
from sinkbench.strategies.base import Strategy
from sinkbench.strategies.checks import check_kind, in_a_line, policy_of
from sinkbench.strategies.formats import Format
from sinkbench.strategies.formats import parse as parse_format
from sinkbench.strategies.plan import LayerSizes, Plan, Positions, make_plan
from sinkbench.strategies.policy import Policy
from sinkbench.strategies.sources import digest, digest_of, source_digest
from sinkbench.validation import nearest, shown

GROUP = "sinkbench.strategies"
BUILTIN = {
    "attention_sinks": "attention_sinks:AttentionSinks",
    "transformers": "transformers:Transformers",
    "windowed": "windowed:Windowed",
    "recompute": "recompute:Recompute",
    "context_shift": "context_shift:ContextShift",
    "pyramid": "pyramid:Pyramid",
    "h2o": "h2o:H2O",
    "tova": "tova:Tova",
    "knorm": "knorm:Knorm",
    "keydiff": "keydiff:KeyDiff",
    "random": "random:Random",
}


@dataclass(frozen=True)
class Found:
    """A strategy's class, and where it is from.

    Attributes:
        name: what it is called: in files' names, tables and keys.
        source: ``built in``, a distribution, or a file.
        sha256: of the source of a class that is not built in, and of what it imports; ``None`` for one that is.
    """

    name: str
    kind: type[Strategy]
    source: str
    sha256: str | None = None


@dataclass(frozen=True)
class Chosen:
    """A strategy with everything that decides what it keeps.

    Attributes:
        strategy: with its parameters.
        window: entries that a layer holds at most, on the average over layers.
        positions: where entries stand.
        format: in which they are stored.
    """

    found: Found
    strategy: Strategy
    window: int
    positions: Positions
    format: Format

    @property
    def name(self) -> str:
        return self.found.name

    def plan(self, sizes: Sequence[LayerSizes]) -> Plan:
        """What each layer of a model of these sizes keeps.

        Raises:
            UserError: parameters that do not go with the window or the model, a format that a layer cannot take, or a
                model that keeps no keys and values.
        """
        context = self.strategy.context(self.window)

        def policy(layer: int, layers: int) -> Any:
            return policy_of(self.strategy, self.name, self.window, layer, layers)

        plan = make_plan(sizes, policy, self.positions, self.format, context)
        if not plan.kept and context is None:
            raise UserError("no layer of this model keeps keys and values, so there is no cache to cut: nothing to run")
        for layer in plan.kept:
            reason = self.format.refuses_dim(layer.sizes.head_dim) or self.format.refuses_policy(layer.policy)
            if reason is not None:
                raise UserError(f"--kv-format {self.format}: {reason}")
        return plan

    @property
    def changes(self) -> dict[str, Any]:
        """What differs from the strategy's own defaults: parameters, positions and format, by name."""
        mine = {name: value for name, value in self.strategy if value != type(self.strategy).model_fields[name].default}
        if self.positions != type(self.strategy).positions:
            mine["positions"] = self.positions
        return mine if self.format == Format() else {**mine, "kv_format": str(self.format)}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides what is kept, as a key needs it. Two choices that keep the same may still differ in it."""
        policy = policy_of(self.strategy, self.name, self.window)
        known = self.found.sha256 is None and self.strategy.context(self.window) is None
        own = {} if self.found.sha256 is None else {"class": self.found.kind.__qualname__}  # a file may have several
        return {
            **own,
            "strategy": self.name,
            "source": self.found.sha256,
            "parameters": {name: _in_json(value) for name, value in self.strategy.model_dump(mode="json").items()},
            "window": policy.window if known else self.window,  # others may make of it what they like in each layer
            "positions": self.positions,
            "format": str(self.format),
        }


def choose(
    experiment: str | Strategy | type[Strategy],
    window: int,
    sinks: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    positions: str | None = None,
    kv_format: str = "model",
) -> Chosen:
    """The strategy that ``--experiment`` names, with its parameters checked.

    Args:
        experiment: a built-in name, an entry point, or ``path/file.py:ClassName``; or a strategy as an object, of
            which ``parameters`` and ``sinks`` replace its own.
        window: ``--window-size``.
        sinks: ``--attention-sink-size``, which a strategy without sinks ignores; ``None`` for its own default.
        parameters: ``--set``.
        positions: ``--positions``; ``None`` for the strategy's own.
        kv_format: ``--kv-format``.

    Raises:
        UserError: no such strategy, or parameters, sizes, positions or a format that cannot be.
    """
    found = find(experiment)
    own = experiment if isinstance(experiment, Strategy) else None
    given = {**({} if own is None else own.model_dump(exclude_unset=True)), **(parameters or {})}
    if sinks is not None and "sinks" in found.kind.model_fields:
        if given.get("sinks", sinks) != sinks:
            raise UserError(f"--attention-sink-size {sinks} and --set sinks={given['sinks']} exclude each other")
        given["sinks"] = sinks
    strategy = _made(found, given, own)
    if positions is not None and positions not in POSITIONS:
        raise UserError(f"--positions must be one of {', '.join(POSITIONS)} (got {positions!r})")
    chosen: Positions = "text" if positions == "text" else "cache" if positions == "cache" else found.kind.positions
    if window < 1:
        raise UserError(f"--window-size must be an integer of at least 1 (got {window})")
    policy = policy_of(strategy, found.name, window)  # refuses sizes that cannot be, whatever the model
    return Chosen(found, strategy, window, chosen, _stored(kv_format, found, policy, strategy.context(window)))


def _stored(kv_format: str, found: Found, policy: Policy, context: int | None) -> Format:
    """The format of this name, where it goes with the strategy."""
    stored = parse_format(kv_format)
    reason = stored.refuses_policy(policy)
    if context is not None and stored != Format():
        reason = f"{found.name} carries no cache that could be stored in a format"
    if reason is not None:
        raise UserError(f"--kv-format {stored}: {reason}")
    return stored


def chosen_by(config: StrategyConfig) -> Chosen:
    """The strategy that a configuration asks for.

    Raises:
        UserError: as :func:`choose`.
    """
    return choose(
        config.experiment if config.objects.strategy is None else config.objects.strategy,
        config.window_size,
        config.attention_sink_size,
        config.set,
        config.positions,
        config.kv_format,
    )


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``name=value`` pairs of ``--set``; a value is read as TOML where it is such, and is a text otherwise.

    Raises:
        UserError: no name, no ``=``, or a name given twice.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"--set {setting}: give name=value, such as --set recent=512")
        if name in found:
            raise UserError(f"--set {name} is given twice")
        try:
            found[name] = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):  # no TOML, or more than can be read
            found[name] = text.strip()
    return found


def find(experiment: str | Strategy | type[Strategy]) -> Found:
    """The class that ``--experiment`` names, or that of a strategy as an object.

    Raises:
        UserError: there is none, it cannot be imported, or it is no strategy.
    """
    if not isinstance(experiment, str):
        return _from_object(experiment)
    if experiment in BUILTIN:
        return _built_in(experiment)
    path, colon, name = experiment.rpartition(":")
    if colon and (path.endswith(".py") or Path(path).is_file()):
        return _from_file(Path(path).expanduser(), name)
    points = _entry_points()
    if experiment in points:
        return _from_entry_point(points[experiment])
    known = [*BUILTIN, *points]
    raise UserError(
        f"--experiment {shown(experiment)} is no strategy{nearest(experiment, known)}; "
        "one of your own is path/to/file.py:ClassName (sinkbench strategies lists all)"
    )


def source_of(experiment: str) -> bytes | None:
    """The source of a strategy from a file, so that it can travel; ``None`` of one that has a name."""
    path, colon, _ = experiment.rpartition(":")
    if experiment in BUILTIN or not colon or not Path(path).expanduser().is_file():
        return None
    return read_bytes(Path(path).expanduser())


def available() -> list[Found]:
    """All strategies that have a name: built in, and from entry points that can be imported."""
    found = [_built_in(name) for name in BUILTIN]
    for point in _entry_points().values():
        try:
            found.append(_from_entry_point(point))
        except UserError:
            continue
    return found


def _built_in(name: str) -> Found:
    module, _, kind = BUILTIN[name].partition(":")
    return Found(name, getattr(import_module(f"sinkbench.strategies.{module}"), kind), "built in")


def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILTIN}


def _from_entry_point(point: EntryPoint) -> Found:
    where = f"the entry point {point.name!r}"
    try:
        kind = point.load()
    except Exception as error:
        raise UserError(f"{where} cannot be imported: {in_a_line(error)}") from error
    check_kind(kind, where)
    file = inspect.getsourcefile(kind)
    source = digest_of(Path(file), Path(file).read_bytes(), kind) if file else digest(b"")
    return Found(point.name, kind, point.dist.name if point.dist else point.value, source)


def _from_file(path: Path, name: str) -> Found:
    try:
        source = read_bytes(path)
    except OSError as error:
        raise UserError(f"--experiment {path}:{name}: the file cannot be read: {error.strerror or error}") from error
    where = f"{path}:{name}"
    kind = getattr(_imported(path, source), name, None)
    if kind is None:
        raise UserError(f"--experiment {where}: the file has no class {name!r}")
    check_kind(kind, where)
    try:
        return Found(snake(name), kind, str(path), digest_of(path, source, kind))
    except OSError as error:
        raise UserError(f"--experiment {where}: imports {error.filename}: {error.strerror or error}") from error


def _from_object(given: Any) -> Found:
    """Of a class that lies in no file it cannot be known whether it is the same another time, and so it never is."""
    kind = given if isinstance(given, type) else type(given)
    if kind.__module__.startswith("sinkbench.strategies."):
        known = next((found for found in map(_built_in, BUILTIN) if found.kind is kind), None)
        if known is not None:
            return known
    check_kind(kind, f"--experiment {kind.__qualname__}")
    source = source_digest(kind) or f"unknown: {kind.__qualname__} lies in no file ({uuid4().hex})"
    return Found(snake(kind.__name__), kind, kind.__module__, source)


def _imported(path: Path, source: bytes) -> ModuleType:
    """The module in a file, executed once for what it says."""
    name = f"sinkbench_strategy_{digest(source)[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--experiment {path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"--experiment {path}: cannot be imported: {in_a_line(error)}") from error
    return module


def _made(found: Found, given: dict[str, Any], own: Strategy | None = None) -> Strategy:
    """The strategy with these parameters: ``own`` where it has just them."""
    try:
        strategy = own if own is not None and given == own.model_dump(exclude_unset=True) else found.kind(**given)
        strategy.model_dump(mode="json")
    except PydanticSerializationError as error:
        raise UserError(f"{found.name}: a parameter cannot be written down: {in_a_line(error)}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name, names = str(first["loc"][0]) if first["loc"] else "", list(found.kind.model_fields)
        if first["type"] == "extra_forbidden":
            known = nearest(name, names) if names else "; it has none"
            raise UserError(f"{found.name} has no parameter {name!r}{known}") from error
        if first["type"] == "missing":
            raise UserError(f"{found.name} needs a value: --set {name}=...") from error
        raise UserError(f"--set {name}: {_lower(first['msg'])} (got {shown(first['input'])})") from error
    return strategy


def _lower(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def _in_json(value: Any) -> Any:
    """``value`` as a record has it, where numbers that are none would all be null."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def snake(name: str) -> str:
    """``ClassName`` as ``class_name``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
