"""What a key knows of a model's files, and what a device is called."""

import shutil
from pathlib import Path

import pytest
from golden import GOLDEN

from sinkbench.config import ModelSource
from sinkbench.models.loading import locate
from sinkbench.runs.key import weights_of
from sinkbench.runs.record import device_name


@pytest.mark.parametrize("trusted", [False, True])
def test_a_models_own_code_counts_where_it_runs(trusted: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
    found = locate(ModelSource(str(folder), trust_remote_code=trusted))
    before = weights_of(found)
    (folder / "modeling_own.py").write_text("# another way to attend\n")
    assert (weights_of(found) != before) == trusted


def test_a_device_has_the_name_that_the_system_has_for_it() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].split() for line in lines if line.startswith("model name")]
    if not names:
        pytest.skip("this system does not say what its CPU is called")
    assert set(names[0]) - {"CPU"} <= set(device_name("cpu").split())
