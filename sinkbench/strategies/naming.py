"""What the files of a run are called."""

import re
from typing import TypeVar

from sinkbench.config import StrategyConfig
from sinkbench.strategies.registry import Chosen, chosen_by

Config = TypeVar("Config", bound=StrategyConfig)


def file_stem(config: StrategyConfig, chosen: Chosen) -> str:
    """What the files of a run are called: as the strategy, and the parameters that differ from its defaults."""
    changes = chosen.changes
    named = [f"{name}_{value}" for name, value in changes.items() if name in config.set]
    named += [str(changes[name]) for name in ("positions", "kv_format") if name in changes]
    return "-".join([chosen.name, *(re.sub(r"[^A-Za-z0-9.-]+", "_", part).strip("_") for part in named)])


def named(config: Config) -> Config:
    """``config`` with a name for its files.

    Raises:
        UserError: as :func:`choose`.
    """
    return config if config.name else config.but(name=file_stem(config, chosen_by(config)))
