"""What is built holds all that runs, and runs away from the repository; its version is said once."""

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

import sinkbench

ROOT = Path(__file__).parents[2]
SOURCES = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "sinkbench").rglob("*")
    if path.is_file() and path.parent.name != "__pycache__"
}


def python(*line, where="/", **variables):
    """Runs it, outside of the repository unless said."""
    command = [sys.executable, *map(str, line)]
    done = subprocess.run(command, check=False, cwd=where, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_cited_and_what_changed_are_of_this_version():
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    changed = re.search(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert cited == sinkbench.__version__
    assert changed in (sinkbench.__version__, "Unreleased")


@pytest.mark.heavy
def test_a_wheel_holds_every_file_of_the_package_and_makes_reports(tmp_path):
    python("-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, where=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"sinkbench-{sinkbench.__version__}-py3-none-any.whl"
    with ZipFile(wheel) as built:
        assert {name for name in built.namelist() if ".dist-info/" not in name} == SOURCES
        built.extractall(tmp_path / "installed")
    page, found = tmp_path / "page.html", {"PYTHONPATH": str(tmp_path / "installed")}
    where = python("-c", "import sinkbench; print(sinkbench.__file__)", **found)
    assert where.strip() == str(tmp_path / "installed" / "sinkbench" / "__init__.py")
    python("-m", "sinkbench", "report", ROOT / "tests" / "fixtures" / "llama_2_7b", "--output", page, **found)
    assert "<style>" in page.read_text()
