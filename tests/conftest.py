"""What every test finds: one thread, random numbers from one seed, and the real command line."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from threading import RLock
from zlib import crc32

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in every process that a test starts: tests share the cores

import numpy as np
import pytest
import torch
from golden import DATA, GOLDEN, golden_options, golden_tokens
from hypothesis import settings
from tqdm import tqdm

__all__ = ["DATA", "GOLDEN", "golden_options", "golden_tokens"]

torch.set_num_threads(1)  # tiny products are quickest on one thread

# The usual lock of progress bars is shared with forked processes: one killed while it holds the lock would stop all.
tqdm.set_lock(RLock())
tqdm.monitor_interval = 0

settings.register_profile("tests", deadline=None, print_blob=True)
settings.load_profile("tests")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", default="0", help="what all random numbers follow from; `any` draws one and prints it")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its own seed
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed == "any":
        config.option.seed = str(random.SystemRandom().randrange(10**6))
    config.option.hypothesis_seed = config.option.hypothesis_seed or config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"random numbers: --seed {config.option.seed}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """What this test's random numbers follow from: ``--seed`` and its name; told where it fails."""
    asked = request.config.option.seed
    value = crc32(f"{asked} {request.node.name}".encode())
    request.node.add_report_section("setup", "seed", f"random numbers follow from --seed {asked}")
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def chance(seed: int) -> random.Random:
    """Random numbers for a test that draws its own."""
    return random.Random(seed)


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
