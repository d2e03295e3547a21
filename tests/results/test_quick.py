"""Whoever looks at results does not wait for torch: it is not imported, nor transformers, nor what is not needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "fixtures" / "llama_2_7b"
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "smollm2_135m_cpu"
HEAVY = ("torch", "transformers", "datasets", "huggingface_hub", "ray", "accelerate")
WATCH = """
import json, sys
from sinkbench.cli import main
try:
    main(sys.argv[1:])
finally:
    sys.stderr.write(json.dumps(sorted(sys.modules)))
"""


def modules_after(code, *arguments):
    """The modules that are there when a process of its own has carried out ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--help"], ("numpy", "pandas", "matplotlib", "plotly")),
        (["--version"], ("numpy", "pandas", "matplotlib", "plotly")),
        (["plot", "--help"], ("numpy", "pandas", "matplotlib", "plotly")),
        (
            ["plot", "--output-dir", REFERENCE, "--output", "a.png", "--skip-first", "5"],
            ("plotly", "matplotlib.pyplot"),
        ),
        (["compare", REFERENCE], ("matplotlib", "plotly")),
        (["compare", REFERENCE, "--by", "budget", "--format", "markdown"], ("matplotlib", "plotly")),
        (["compare", RESULTS, "--by", "recall-distance", "--format", "json"], ("matplotlib", "plotly")),
        (["report", REFERENCE, "--output", "a.html"], ("matplotlib",)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_that_looks_at_results_imports_neither_torch_nor_what_it_does_not_use(
    arguments, unneeded, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    loaded = modules_after(WATCH, *arguments)
    assert "sinkbench.cli" in loaded
    assert loaded & {*HEAVY, *unneeded} == set()


def test_no_module_of_results_imports_torch_or_transformers():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "sinkbench" / "results").rglob("*.py")
        if path.name != "__init__.py"
    )
    imports = "".join(f"import {module}\n" for module in modules)
    loaded = modules_after(f"{imports}import json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))")
    assert set(modules) <= loaded
    assert loaded & set(HEAVY) == set()
    others = {name for name in loaded if name.startswith("sinkbench.") and not name.startswith("sinkbench.results")}
    assert others == {"sinkbench.errors", "sinkbench.files", "sinkbench.signals"}
