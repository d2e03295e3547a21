"""Runs of the golden model that are cut short and go on."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from golden import golden_options

NUMBERS = ["ppl", "overall_ppl"]
TOKENS = 300


def run(out: Path, *more: Any, family: str = "llama") -> list[str]:
    """A command line over all golden tokens."""
    return ["run", *golden_options(family), "--num-tokens", str(TOKENS), "--output-dir", str(out), *map(str, more)]


def same(csv: Path, whole: Path) -> None:
    """Each row once, and the numbers of an undisturbed run within rounding."""
    ours, wanted = pd.read_csv(csv), pd.read_csv(whole)
    assert list(ours.columns) == list(wanted.columns)
    assert list(ours.input_length) == list(wanted.input_length)
    assert list(ours.token) == list(wanted.token)
    assert list(ours.kv_cache_bytes) == list(wanted.kv_cache_bytes)
    assert ours.nll.to_numpy() == pytest.approx(wanted.nll.to_numpy(), abs=2e-4)
    for column in NUMBERS:
        assert ours[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), rel=2e-4)


def cut(csv: Path, rows: int, rest: str = "") -> None:
    """Leave ``rows`` rows and the beginning of another, and the record of a run that was killed."""
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[: rows + 1]) + rest)
    path = csv.with_suffix(".json")
    record = json.loads(path.read_text())
    kept = {name: record[name] for name in record if name not in ("rows", "seconds", "overall_ppl", "median_latency")}
    path.write_text(json.dumps(kept | {"exit_reason": "running", "ended": None}))


def copied(csv: Path, folder: Path) -> Path:
    """The files of a run, in a folder where they may be changed."""
    for suffix in (".csv", ".json"):
        (folder / csv.name).with_suffix(suffix).write_bytes(csv.with_suffix(suffix).read_bytes())
    return folder / csv.name
