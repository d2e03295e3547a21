"""Runs that nothing disturbed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from resuming import copied, run

from sinkbench.cli import main


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """The CSV of a run that nothing disturbed, by family, strategy and engine; made when it is first asked for."""
    made: dict[tuple[str, str, str], Path] = {}

    def of(family: str, strategy: str, engine: str) -> Path:
        key = (family, strategy, engine)
        if key not in made:
            out = tmp_path_factory.mktemp("whole")
            main(run(out, "--experiment", strategy, "--engine", engine, "--chunk-size", 64, family=family))
            made[key] = out / f"{strategy}.csv"
        return made[key]

    return of


@pytest.fixture
def finished(whole: Callable[[str, str, str], Path], tmp_path: Path) -> Path:
    """A finished run of its own: the CSV."""
    return copied(whole("llama", "attention_sinks", "stepwise"), tmp_path)
