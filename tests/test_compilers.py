"""What cannot be compiled is done without, and said once."""

import subprocess
import warnings

import pytest

from sinkbench import compilers
from sinkbench.compilers import attempted


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc"]),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_a_machine_without_a_compiler_is_one_line(error, monkeypatch):
    def launch():
        raise error

    monkeypatch.setattr(compilers, "REFUSED", set())
    with pytest.warns(UserWarning, match="the kernel for 'launch' cannot be compiled") as lines:
        assert attempted(launch) is None
    assert len(lines) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attempted(launch) is None


def test_any_other_error_is_the_callers():
    def launch():
        raise RuntimeError("out of shared memory of another kind")

    with pytest.raises(RuntimeError, match="another kind"):
        attempted(launch)
