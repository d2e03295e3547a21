"""Experiment files: TOML that gives the options of ``sinkbench run``, and the matrix of runs that its lists span.

A file is a flat table of options, words joined by ``-`` or ``_``. Those that :data:`AXES` names may be lists: the file
then stands for all combinations. An entry of ``experiment`` may be a table, ``{ name = "random", seed = 3 }``, with
parameters of the strategy, its ``positions``, its ``kv_format`` and its own windows; one of ``dataset_name``,
``{ name = "stdlib", documents = true }``, with options about the dataset. A table ``[set]`` gives parameters to all
strategies of the file that have them. A table ``[shape]``, or ``[shape."model"]`` for each of several, has the sizes of
a model, so that its cost can be estimated without it (:mod:`sinkbench.sweeps.estimate`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, create_model

from sinkbench.config import DATA, ModelSource, Option, RunConfig, options_of
from sinkbench.errors import UserError
from sinkbench.models.sizes import ModelSizes, read_sizes
from sinkbench.strategies.naming import file_stem
from sinkbench.strategies.registry import chosen_by, find
from sinkbench.sweeps.tables import about, spelled, table_in
from sinkbench.validation import Axis, Entry, checked, nearest, shown


def axes_of(config: type[BaseModel]) -> tuple[str, ...]:
    """The options that may be lists in a file."""
    return tuple(name for name, option in options_of(config).items() if option.axis)


def listed(config: type[BaseModel]) -> type[BaseModel]:
    """``config`` as a file gives it: the same fields, of which an axis is a list of values."""
    fields: dict[str, Any] = {}
    for name, option in options_of(config).items():
        field = config.model_fields[name]
        default = field.get_default(call_default_factory=True)
        said = [part for part in field.metadata if not isinstance(part, Option)]
        kind: Any = Annotated[(field.annotation, *said)] if said else field.annotation  # type: ignore[name-defined]
        if option.axis:
            kind, default = Axis[kind], [default]
        fields[name] = (kind, Field(default=default, strict=field_strict(field)))
    for name in TABLES:
        fields[name] = (Axis[Entry], Field(default=fields[name][1].default))
    return create_model("Listed" + config.__name__, __config__=config.model_config, **fields)


def field_strict(field: Any) -> bool | None:
    """Whether a field is declared strict, or not; ``None`` where it follows its model."""
    return next((x.strict for x in field.metadata if hasattr(x, "strict")), None)


TABLES = {  # axes whose values may be tables, and an example
    "experiment": '{ name = "random", seed = 3 }',
    "dataset_name": '{ name = "stdlib", documents = true }',
}
OF_ENTRY = ("positions", "kv_format", "window_size")  # options that an entry of experiment may have for itself
OF_TEXT = ("trace",)  # and those that one of dataset_name may have, beside options about the dataset
AXES = axes_of(RunConfig)
Listed: Any = listed(RunConfig)


@dataclass(frozen=True)
class Experiments:
    """What a file asks for.

    Attributes:
        options: its options, as :data:`Listed` has them.
        shapes: sizes of models, by name, of those whose sizes the file has.
    """

    path: Path
    options: Any
    shapes: dict[str, ModelSizes]

    def into(self, folder: Path) -> "Experiments":
        """The same with results in another folder."""
        return replace(self, options=self.options.model_copy(update={"output_dir": folder}))

    @cached_property
    def _kept(self) -> list[RunConfig]:
        return self._strategies()

    def cells(self) -> list[RunConfig]:
        """All runs, those of one model together; of those that come to the same, the first.

        The runs of one model, dataset and dtype lie in one folder: ``output_dir``, or folders in it named after those
        of the three that vary.
        """
        return list(self._cells)

    @cached_property
    def _cells(self) -> list[RunConfig]:
        o = self.options
        groups = product(o.model_name_or_path, o.dtype, map(_data, o.dataset_name))
        return [
            _about_data(kept, about).but(
                model_name_or_path=model, dtype=dtype, output_dir=self._folder(model, about["dataset_name"], dtype)
            )
            for model, dtype, about in groups
            for kept in self._kept
        ]

    def shape(self, model: ModelSource) -> ModelSizes:
        """The sizes of a model: the file's, or else those of the model's configuration.

        Raises:
            UserError: the file has none, and the configuration cannot be had.
        """
        from sinkbench.models.loading import locate

        return self.shapes.get(model.name) or read_sizes(locate(model))

    def _strategies(self) -> list[RunConfig]:
        """One configuration for each strategy and its sizes, named after what varies."""
        distinct: dict[str, RunConfig] = {}
        for config in self._combinations():
            distinct.setdefault(self._identity(config), config)
        return _apart([config.but(name=self._stem(config)) for config in distinct.values()])

    @cached_property
    def _known(self) -> dict[tuple[Any, ...], str]:
        """Identities, by what decides them: thousands of runs are told apart by a few values of each size."""
        return {}

    def _identity(self, config: RunConfig) -> str:
        c = config
        about = c.experiment, repr(c.set), c.positions, c.kv_format, c.window_size, c.attention_sink_size
        if about not in self._known:
            self._known[about] = json.dumps(chosen_by(config).identity, sort_keys=True)
        return self._known[about]

    def _combinations(self) -> Iterator[RunConfig]:
        o = self.options
        alone = {name: getattr(o, name) for name in options_of(RunConfig) if name not in AXES}
        for entry, positions, stored in product(o.experiment, o.positions, o.kv_format):
            asked = {"positions": positions, "kv_format": stored} | _entry(entry, o.set)
            windows = _listed(asked.pop("window_size", o.window_size))
            for window, sinks in product(windows, o.attention_sink_size):
                yield _run({**alone, "window_size": window, "attention_sink_size": sinks, **asked})

    def _folder(self, model: str, dataset: str, dtype: str) -> Path:
        o = self.options
        texts = [_name(entry, "dataset_name") for entry in o.dataset_name]
        axes = ((model, o.model_name_or_path), (dataset, texts), (dtype, o.dtype))
        return Path(o.output_dir, *(slugs(values)[value] for value, values in axes if len(values) > 1))

    def _stem(self, config: RunConfig) -> str:
        """The strategy, its parameters, and those of the sizes that make a difference to it here."""
        o, stem, own = self.options, file_stem(config, chosen_by(config)), self._identity(config)
        for name, short in (("window_size", "window"), ("attention_sink_size", "sinks")):
            others = (value for value in getattr(o, name) if value != getattr(config, name))
            if any(self._identity(config.but(**{name: value})) != own for value in others):  # mostly the first does
                stem += f"-{short}_{getattr(config, name)}"
        return stem


def _apart(configs: list[RunConfig]) -> list[RunConfig]:
    """``configs``, whose files have names of their own, also where case does not count."""
    known: dict[str, RunConfig] = {}
    for config in configs:
        other = known.setdefault(str(config.name).lower(), config)
        if other is not config:
            both = " and ".join(_shown(each) for each in (other, config))
            raise UserError(f"experiment: {both} would both be written to {config.name}.csv: give them a file each")
    return configs


def _shown(config: RunConfig) -> str:
    """A strategy with its parameters, as they were given."""
    return f"{config.experiment} with {shown(config.set)}" if config.set else config.experiment


def _run(options: dict[str, Any]) -> RunConfig:
    return checked(RunConfig, options, lambda key: f"{key}: " if key else "")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name(entry: str | dict[str, Any], axis: str = "experiment") -> str:
    """What an entry of an axis names."""
    name = entry if isinstance(entry, str) else entry.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{axis}: a table must have a name, as {TABLES[axis]} (got {shown(entry)})")
    return name


def _about_data(config: RunConfig, about: dict[str, Any]) -> RunConfig:
    """``config`` with these options about the dataset."""
    if len(about) == 1:
        return config.but(**about)
    return _run(config.model_dump() | about).but(objects=config.objects)


def _data(entry: str | dict[str, Any]) -> dict[str, Any]:
    """The options that an entry of ``dataset_name`` gives."""
    name = _name(entry, "dataset_name")
    if isinstance(entry, str):
        return {"dataset_name": name}
    table = {key: entry[key] for key in entry if key != "name"}
    known = [option for option, said in options_of(RunConfig).items() if said.panel == DATA and not said.axis]
    known += OF_TEXT
    for key in table:
        if key not in known:
            raise UserError(f"dataset_name: {key!r} is no option about the dataset{nearest(key, known)}")
    return {"dataset_name": name, **table}


def _entry(entry: str | dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """The options that an entry of ``experiment`` gives; ``common`` are the parameters that all may have."""
    name = _name(entry)
    table = {} if isinstance(entry, str) else {key: value for key, value in entry.items() if key != "name"}
    own: dict[str, Any] = {key: table.pop(key) for key in OF_ENTRY if key in table}
    known = find(name).kind.model_fields
    return {"experiment": name, "set": {k: v for k, v in common.items() if k in known} | table, **own}


def read_experiments(path: Path) -> Experiments:
    """Read and check a file.

    Raises:
        UserError: in one line, the file, the key and what it must be.
    """
    return experiments(path, table_in(path))


def experiments(path: Path, table: dict[str, Any]) -> Experiments:
    """What ``table`` asks for; ``path`` is what it is called.

    Raises:
        UserError: as :func:`read_experiments`.
    """
    with about(path):
        table = spelled(table)
    shapes = table.pop("shape", {})
    options = _checked(path, table)
    with about(path):
        _check_settings(options.set, options.experiment)
        _check_texts(options.dataset_name)
        found = Experiments(path, options, _shapes(path, shapes, options.model_name_or_path))
        found.cells()
    return found


def _check_settings(common: dict[str, Any], entries: Sequence[str | dict[str, Any]]) -> None:
    """Refuse a parameter that none of the strategies has."""
    known = {name for entry in entries for name in find(_name(entry)).kind.model_fields}
    for name in common:
        if name not in known:
            raise UserError(f"set.{name}: is no parameter of any strategy of this file")


def _check_texts(entries: Sequence[str | dict[str, Any]]) -> None:
    """Refuse two entries of one text, which would have one folder."""
    names = [_name(entry, "dataset_name") for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"dataset_name: {twice} stands in several entries, whose results would lie in one folder")


def read_options(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a single run: those ``given`` on the command line, and a file's for all that it does not say.

    A strategy that the line names takes the parameters that the file has for it, one by one.

    Raises:
        UserError: a value that a file cannot have, one option at a time; several, of which the line picks none.
    """
    table = table_in(path)
    table.pop("shape", None)
    options = _checked(path, table)
    with about(path):
        picked = _picked(options.experiment, given)
        _check_settings(options.set, [*options.experiment, picked])
        found = _entry(picked, options.set)
        if "window_size" in found and "window_size" not in given:
            found["window_size"] = _only("window_size", _listed(found["window_size"]))
        if "dataset_name" not in given and "dataset_name" in options.model_fields_set:
            found |= _data(_only("dataset_name", options.dataset_name))
        for name, value in options.model_dump(exclude_unset=True).items():
            if name not in found and name not in given:
                found[name] = _only(name, value) if name in AXES else value
    return {**found, **given, "set": {**found["set"], **given.get("set", {})}}


def _only(name: str, values: Sequence[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    listed = ", ".join(value if isinstance(value, str) else shown(value) for value in values)
    raise UserError(
        f"{name}: has several values ({listed}): give one with --{name.replace('_', '-')}, "
        "or run them all with `sinkbench sweep`"
    )


def _picked(entries: Sequence[str | dict[str, Any]], given: dict[str, Any]) -> str | dict[str, Any]:
    """The entry of a file that the line names: the only one, or a strategy that the file does not have."""
    name = given.get("experiment")
    if name is None:
        return _only("experiment", entries)
    of_name = [entry for entry in entries if _name(entry) == name]
    if len(of_name) > 1:
        raise UserError(f"experiment: has several settings of {name}: run them all with `sinkbench sweep`")
    return of_name[0] if of_name else name


def _checked(path: Path, table: dict[str, Any]) -> Any:
    with about(path):
        return checked(Listed, table, lambda key: f"{key}: " if key else "", AXES)


def slugs(names: Sequence[str]) -> dict[str, str]:
    """Folder names for ``names``, distinct also where case does not count: the last part of each if that will do."""
    for part in (lambda name: name.rstrip("/").rsplit("/", 1)[-1], lambda name: name):
        found = {name: re.sub(r"[^a-z0-9.]+", "_", part(name).lower()).strip("._") for name in names}
        if all(found.values()) and len(set(found.values())) == len(found):
            return found
    return {name: f"{index}_{slug}".strip("_") for index, (name, slug) in enumerate(found.items(), start=1)}


def _shapes(path: Path, tables: Any, models: list[str]) -> dict[str, ModelSizes]:
    """``[shape]`` is that of the only model; ``[shape."name"]`` that of the model of this name."""
    if not isinstance(tables, dict):
        raise UserError(f"{path}: shape: must be a table (got {shown(tables)})")
    if not any(isinstance(value, dict) for value in tables.values()):
        if tables and len(models) > 1:
            raise UserError(f'{path}: shape: must be a table for each model, as [shape."{models[0]}"]')
        return {models[0]: checked(ModelSizes, tables, lambda key: f"{path}: shape.{key}: ")} if tables else {}
    for name in tables:
        if name not in models:
            raise UserError(f"{path}: shape: {name!r} is no model of this file{nearest(name, models)}")
    return {name: _sizes(path, name, table) for name, table in tables.items()}


def _sizes(path: Path, model: str, table: Any) -> ModelSizes:
    return checked(ModelSizes, table, lambda key: f"{path}: shape.{json.dumps(model)}.{key}: ")
