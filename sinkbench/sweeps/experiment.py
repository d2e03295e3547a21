"""Experiment files: TOML that gives the options of ``sinkbench run``, and the matrix of runs that its lists span.

A file is a flat table of options, words joined by ``-`` or ``_``. Each of :data:`sinkbench.config.AXES` may be a list:
the file then stands for all combinations. A table ``[shape]``, or ``[shape."model"]`` for each of several, has the
sizes of a model, so that its cost can be estimated without it (:mod:`sinkbench.sweeps.estimate`).
"""

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkbench.config import Options
from sinkbench.errors import UserError
from sinkbench.models.sizes import ModelSizes, read_sizes
from sinkbench.strategies import choose
from sinkbench.validation import checked, nearest, shown

if TYPE_CHECKING:
    from sinkbench.config import RunOptions


@dataclass(frozen=True)
class Experiments:
    """What a file asks for.

    Attributes:
        shapes: sizes of models, by name, of those whose sizes the file has.
    """

    path: Path
    options: Options
    shapes: dict[str, ModelSizes]

    def cells(self) -> list["RunOptions"]:
        """All runs, those of one model together; a strategy that ignores a size runs once over that size's values.

        The runs of one model, dataset and dtype lie in one folder: ``output_dir``, or folders in it named after those
        of the three that vary.
        """
        o = self.options
        groups = product(o.model_name_or_path, o.dtype, o.dataset_name)
        return [self._run(*group, *sizes) for group in groups for sizes in self._strategies()]

    def shape(self, cell: "RunOptions") -> ModelSizes:
        """The shape of a cell's model: the file's, or else that of the model's configuration.

        Raises:
            UserError: the file has none, and the configuration cannot be had.
        """
        return self.shapes.get(cell.model.name) or read_sizes(cell.model)

    def _strategies(self) -> list[tuple[str, int, int]]:
        """Experiments with their sizes, the first of those that come to the same."""
        o = self.options
        distinct: dict[str, tuple[str, int, int]] = {}
        for sizes in product(o.experiment, o.window_size, o.attention_sink_size):
            distinct.setdefault(_identity(*sizes), sizes)
        return list(distinct.values())

    def _run(self, model: str, dtype: str, dataset: str, experiment: str, window: int, sinks: int) -> "RunOptions":
        from sinkbench.config import ModelSource, RunOptions, Source

        o = self.options
        bits = "4bit" if o.load_in_4bit else "8bit" if o.load_in_8bit else None
        return RunOptions(
            experiment=experiment,
            model=ModelSource(
                name=model,
                revision=o.revision,
                trust_remote_code=o.trust_remote_code,
                dtype=dtype,
                device_map=o.device_map,
                random_weights=o.random_weights,
                quantization=bits,
                allow_pickle=o.allow_pickle,
            ),
            source=Source(
                name=dataset,
                column=o.data_column,
                task=o.task,
                split=o.split,
                samples=o.num_samples,
                revision=o.dataset_revision,
                streaming=o.streaming,
            ),
            num_tokens=o.num_tokens,
            window_size=window,
            attention_sink_size=sinks,
            engine=o.engine,
            chunk_size=o.chunk_size,
            cuda_graphs=o.cuda_graphs,
            output_dir=self._folder(model, dataset, dtype),
            overwrite=o.overwrite,
            resume=o.resume,
            name=self._stem(experiment, window, sinks),
        )

    def _folder(self, model: str, dataset: str, dtype: str) -> Path:
        o = self.options
        axes = ((model, o.model_name_or_path), (dataset, o.dataset_name), (dtype, o.dtype))
        return Path(o.output_dir, *(slugs(values)[value] for value, values in axes if len(values) > 1))

    def _stem(self, experiment: str, window: int, sinks: int) -> str:
        """The experiment, and those of the sizes that make a difference to it here."""
        o = self.options
        stem = experiment
        if len({_identity(experiment, w, sinks) for w in o.window_size}) > 1:
            stem += f"-window_{window}"
        if len({_identity(experiment, window, s) for s in o.attention_sink_size}) > 1:
            stem += f"-sinks_{sinks}"
        return stem


def _identity(experiment: str, window: int, sinks: int) -> str:
    return json.dumps(choose(experiment, window, sinks).identity, sort_keys=True)


def read(path: Path) -> Experiments:
    """Read and check a file.

    Raises:
        UserError: in one line, the file, the key and what it must be.
    """
    table = _table(path)
    shapes = table.pop("shape", {})
    options = checked(Options, table, f"{path}: ")
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError(f"{path}: load_in_4bit and load_in_8bit exclude each other: leave one out")
    for experiment, window, sinks in product(options.experiment, options.window_size, options.attention_sink_size):
        try:
            choose(experiment, window, sinks)
        except UserError as error:
            raise UserError(
                f"{path}: attention_sink_size: must be less than window_size (got {sinks} with window_size {window}, "
                f"experiment {experiment})"
            ) from error
    return Experiments(path, options, _shapes(path, shapes, options.model_name_or_path))


def read_options(path: Path) -> dict[str, Any]:
    """The options that a file gives, for a single run: several values of an axis as a list, one alone as itself.

    Raises:
        UserError: as :func:`read` does, one option at a time; what only holds between options is not looked at.
    """
    table = _table(path)
    table.pop("shape", None)
    given = checked(Options, table, f"{path}: ").model_dump(exclude_unset=True)
    return {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in given.items()}


def slugs(names: Sequence[str]) -> dict[str, str]:
    """Folder names for ``names``, distinct also where case does not count: the last part of each if that will do."""
    for part in (lambda name: name.rstrip("/").rsplit("/", 1)[-1], lambda name: name):
        found = {name: re.sub(r"[^a-z0-9.]+", "_", part(name).lower()).strip("._") for name in names}
        if all(found.values()) and len(set(found.values())) == len(found):
            return found
    return {name: f"{index}_{slug}".strip("_") for index, (name, slug) in enumerate(found.items(), start=1)}


def _table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8, as TOML must be (byte {error.start})") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: is not TOML: {error}") from error
    spelled: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name in spelled:
            raise UserError(f"{path}: {name}: is given twice, with - and with _")
        spelled[name] = value
    return spelled


def _shapes(path: Path, tables: Any, models: list[str]) -> dict[str, ModelSizes]:
    """``[shape]`` is that of the only model; ``[shape."name"]`` that of the model of this name."""
    if not isinstance(tables, dict):
        raise UserError(f"{path}: shape: must be a table (got {shown(tables)})")
    if not any(isinstance(value, dict) for value in tables.values()):
        if tables and len(models) > 1:
            raise UserError(f'{path}: shape: must be a table for each model, as [shape."{models[0]}"]')
        return {models[0]: checked(ModelSizes, tables, f"{path}: shape.")} if tables else {}
    for name in tables:
        if name not in models:
            raise UserError(f"{path}: shape: {name!r} is no model of this file{nearest(name, models)}")
    return {name: checked(ModelSizes, table, f"{path}: shape.{json.dumps(name)}.") for name, table in tables.items()}
