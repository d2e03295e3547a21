"""Models, tokenizers and datasets that a program gives as objects, where the command line has names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sinkbench.config import DTYPES, ModelSource, RunConfig, flag
from sinkbench.errors import UserError
from sinkbench.models.given import check_model
from sinkbench.models.loading import load_tokenizer, locate

LOADING = (  # options that say how a model is loaded
    "revision",
    "trust_remote_code",
    "allow_pickle",
    "dtype",
    "device_map",
    "random_weights",
    "load_in_4bit",
    "load_in_8bit",
)
FETCHING = ("dataset_revision", "task", "streaming")  # options that say how a dataset is fetched


def taken(options: dict[str, Any], tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """``options`` with names for what is an object, and the objects as :class:`sinkbench.config.Objects` has them.

    Raises:
        UserError: an object of a wrong kind, or an option that is of no use beside it.
    """
    options, objects = dict(options), {}
    if tokenizer is not None:
        objects["tokenizer"] = _tokenizer(tokenizer)
    model = options.get("model_name_or_path")
    if model is not None and not isinstance(model, str):
        check_model(model)
        _refuse_beside(options, LOADING, "the model")
        objects["model"] = model
        dtype = str(model.dtype).removeprefix("torch.")
        options |= {
            "model_name_or_path": model.name_or_path or type(model).__name__,
            "dtype": dtype if dtype in DTYPES else "auto",
            "device_map": "auto" if model.device.type == "meta" else str(model.device),
        }
    data = options.get("dataset_name")
    if data is not None and not isinstance(data, str):
        _refuse_beside(options, FETCHING, "the dataset")
        column = options.get("data_column", RunConfig.model_fields["data_column"].default)
        rows = _rows(data, options.get("split", RunConfig.model_fields["split"].default), column)
        if isinstance(rows.held, list):
            options.setdefault("num_samples", max(1, len(rows.held)))
        objects["rows"] = rows
        options["dataset_name"] = type(data).__name__
    return options, objects


def _refuse_beside(options: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    useless = [name for name in names if name in options and options[name] != RunConfig.model_fields[name].default]
    if useless:
        raise UserError(f"{flag(useless[0])} says how {what} is loaded, which is given as an object: leave it out")


def _tokenizer(given: Any) -> Any:
    """A tokenizer that is at hand, or that of a model of this name."""
    if isinstance(given, str):
        return load_tokenizer(locate(ModelSource(given, random_weights=True)))  # of which no weights are needed
    if not callable(given) or not hasattr(given, "decode"):
        raise UserError(f"tokenizer must be a name, or a tokenizer of transformers (got {type(given).__name__})")
    return given


@dataclass(frozen=True)
class Rows:
    """A dataset at hand, as often as it is read.

    Attributes:
        held: its rows, each a mapping by column; or the cells of one column.
        column: which one.
    """

    held: Iterable[Any]
    column: str

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.held:
            cells = row if isinstance(row, Mapping) else {self.column: row}
            yield {name: value.tolist() if hasattr(value, "tolist") else value for name, value in cells.items()}


def _rows(given: Any, split: str, column: str) -> Rows:
    """Rows of whatever holds texts or token ids."""
    if isinstance(given, Mapping):
        if split not in given:
            there = ", ".join(sorted(map(str, given))) or "none"
            raise UserError(f"--dataset-name: no split {split!r} in this {type(given).__name__}: there are {there}")
        return _rows(given[split], split, column)
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a frame of pandas
        return Rows(given.to_dict("records"), column)
    if hasattr(given, "tolist"):  # an array or a tensor
        given = given.tolist()
    if isinstance(given, Iterator):
        return Rows(list(islice(given, 10**6)), column)
    if isinstance(given, list | tuple):
        stream = bool(given) and all(isinstance(one, int) and not isinstance(one, bool) for one in given)
        cells = [given] if stream else given
        return Rows([list(cell) if isinstance(cell, tuple) else cell for cell in cells], column)
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise UserError(
            f"--dataset-name must be a name, or texts, token ids or a dataset as an object (got {type(given).__name__})"
        )
    return Rows(given, column)
