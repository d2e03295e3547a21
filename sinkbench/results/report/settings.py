"""What a run was made with: what all runs of a group share, and in what they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sinkbench.results.run import Run

# What is read under which name, in this order; everything else among the options follows under its own.
NAMED = {
    "model": (("model", "name"), ("options", "model", "name")),
    "class": (("model", "class"),),
    "revision": (("model", "revision"), ("options", "model", "revision")),
    "remote code": (("options", "model", "trust_remote_code"),),
    "parameters": (("model", "parameters"),),
    "random weights": (("model", "random_weights"), ("options", "model", "random_weights")),
    "attention": (("model", "attention"),),
    "dtype": (("dtype",), ("options", "model", "dtype")),
    "engine": (("engine",), ("options", "engine")),
    "window": (("options", "window_size"),),
    "sinks": (("options", "attention_sink_size"),),
    "dataset": (("dataset", "name"), ("options", "source", "name")),
    "dataset column": (("options", "source", "column"),),
    "dataset configuration": (("options", "source", "task"),),
    "dataset split": (("options", "source", "split"),),
    "dataset rows": (("options", "source", "samples"),),
    "dataset documents": (("dataset", "streams"),),
    "dataset tokens": (("dataset", "tokens"),),
    "dataset sha256": (("dataset", "sha256"),),
    "tokens asked for": (("options", "num_tokens"), ("options", "max_new_tokens")),
    "device": (("device",),),
}
# What is shown elsewhere, or does not decide a number.
ELSEWHERE = {"experiment", "output dir", "overwrite", "name", "resume", "trace"}
LATER = {"started": ("started",), "ended": ("ended",)}


@dataclass(frozen=True)
class GroupSettings:
    """Settings of a group.

    Attributes:
        shared: by name, what all runs that say it have in common.
        names: of the settings in which runs differ.
        different: by run, the values of these.
        recorded: whether any run has a record.
    """

    shared: dict[str, str]
    names: list[str]
    different: dict[str, list[str]]
    recorded: bool


def group_settings(runs: Sequence[Run]) -> GroupSettings:
    """The settings of ``runs``, parted by whether they are the same in all."""
    of_runs = {run.name: settings_of(run) for run in runs}
    names = list(dict.fromkeys(name for values in of_runs.values() for name in values))
    shared, differing = {}, []
    for name in names:
        values = {found[name] for found in of_runs.values() if name in found}
        if len(values) == 1:
            shared[name] = values.pop()
        else:
            differing.append(name)
    different = {run: [found.get(name, "") for name in differing] for run, found in of_runs.items()}
    return GroupSettings(shared, differing, different, any(run.record for run in runs))


def settings_of(run: Run) -> dict[str, str]:
    """All settings of one run, as text."""
    found: dict[str, str] = {}
    for name, places in NAMED.items():
        value = next((known for place in places if (known := run.recorded(*place)) is not None), None)
        if value is not None:
            found[name] = shown_value(value)
    taken = {place for places in NAMED.values() for place in places}
    for keys, value in _leaves(run.recorded("options"), ("options",)):
        name = " ".join(keys[1:]).replace("_", " ")
        if keys not in taken and name not in ELSEWHERE and value is not None:
            found.setdefault(name, shown_value(value))
    versions = run.recorded("versions")
    for package, version in versions.items() if isinstance(versions, dict) else ():
        found[f"{package} version"] = "unknown" if version is None else shown_value(version)
    for name, place in LATER.items():
        if run.recorded(*place) is not None:
            found[name] = str(run.recorded(*place)).replace("T", " ").replace("+00:00", " UTC")
    return found


def shown_value(value: Any) -> str:
    """A value of a record as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _leaves(value: Any, keys: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """The values in nested objects, each with its keys."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, (*keys, str(key)))]
    return [(keys, value)] if len(keys) > 1 else []
