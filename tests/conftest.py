"""Shared pieces: the golden folders, and the real command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "fixtures"
GOLDEN = DATA / "golden"

torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def golden_options(family: str) -> list[str]:
    """Options that run on the golden model and tokens of ``family``."""
    folder = GOLDEN / family
    return [
        *("--model-name-or-path", str(folder), "--dataset-name", str(folder / "tokens.jsonl")),
        *("--data-column", "input_ids", "--window-size", "32", "--attention-sink-size", "4", "--dtype", "float32"),
    ]


def golden_tokens(family: str) -> torch.Tensor:
    return torch.tensor(json.loads((GOLDEN / family / "tokens.jsonl").read_text())["input_ids"])


@pytest.fixture(scope="session")
def sinkbench() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The installed command, as a process of its own, offline."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80", **environment}
        command = [sys.executable, "-m", "sinkbench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)

    return call


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line within this process: exit status, standard output and standard error."""
    from sinkbench.cli import main

    def call(*arguments: str) -> tuple[int, str, str]:
        status = 0
        capsys.readouterr()  # what came before is not the command's
        try:
            status = int(main([str(a) for a in arguments]) or 0)
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
