"""docs/notebook.ipynb does what it shows, and importing sinkbench costs nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def runner():
    """docs/notebook.py, which writes the outputs."""
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forms(cell) -> list[str]:
    """In which forms the outputs of a cell are, and what it has printed."""
    return [
        "".join(output["text"]) if output["output_type"] == "stream" else ", ".join(output["data"])
        for output in cell["outputs"]
    ]


@pytest.mark.heavy
def test_the_notebook_runs_and_shows_what_it_says_it_shows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = json.loads(NOTEBOOK.read_text())
    found = runner().executed(kept)
    for before, now in zip(kept["cells"], found["cells"], strict=True):
        if before["cell_type"] == "code":
            assert forms(now) == forms(before)
    shown = json.dumps([cell.get("outputs") for cell in found["cells"]])
    assert "image/png" in shown
    assert "--engine must be one of stepwise, parallel" in shown


def test_the_notebook_is_kept_with_its_outputs_and_small() -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert NOTEBOOK.stat().st_size < 200_000


@pytest.mark.parametrize(
    ("code", "unneeded"),
    [
        ("import sinkbench; dir(sinkbench)", ("torch", "numpy", "pandas", "pydantic", "matplotlib", "sinkbench.api")),
        ("import sinkbench; sinkbench.UserError", ("torch", "numpy", "pydantic")),
        ("import sinkbench; sinkbench.run; sinkbench.sweep", ("torch", "transformers", "pandas", "matplotlib")),
        ("import sinkbench; sinkbench.read; sinkbench.compare; sinkbench.plot", ("torch", "transformers")),
        (
            f"import sinkbench; sinkbench.compare({str(ROOT / 'tests' / 'fixtures' / 'llama_2_7b')!r})",
            ("torch", "transformers", "matplotlib"),
        ),
        (
            "import sinkbench\n"
            "try: sinkbench.run(engine='paralel')\n"
            "except sinkbench.UserError: pass\n"
            "else: raise SystemExit(1)",
            ("torch", "transformers"),
        ),
    ],
)
def test_what_is_not_needed_is_not_imported(code, unneeded) -> None:
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert loaded & set(unneeded) == set()
