"""A strategy of one's own, in a file or in an installed package, is run, resumed and swept as a built-in one is."""

import json

import pandas as pd
import pytest
from golden import GOLDEN
from resuming import cut, run

TOVA = '''\
"""TOVA (arXiv 2401.06104), by a stranger."""

from typing import ClassVar

from sinkbench.strategies import Eviction


class Tova(Eviction):
    """Those that the newest query looks at, the same for all heads of a layer."""

    choice: ClassVar = "layer"

    def score(self, held):
        return held.weights.mean((1, 2))[:, None]
'''

FADING = '''\
"""Nobody has published this: attention that fades with every step, worth less the smaller the key is."""

from typing import ClassVar

from sinkbench.strategies import Eviction


class FadingAttention(Eviction):
    """Those that were looked at lately, by norm of their keys."""

    memory: ClassVar = ("trace",)

    fade: float = 0.75

    def score(self, held):
        trace = held.memory["trace"]
        trace.mul_(self.fade).add_(held.weights.sum(2))
        return trace * held.keys.norm(dim=-1)
'''
MODEL = {
    "model_name_or_path": str(GOLDEN / "llama"),
    "dataset_name": str(GOLDEN / "llama" / "tokens.jsonl"),
    "data_column": "input_ids",
    "dtype": "float32",
}


@pytest.fixture
def tova(tmp_path):
    path = tmp_path / "strangers_tova.py"
    path.write_text(TOVA)
    return f"{path}:Tova"


@pytest.fixture
def fading(tmp_path):
    path = tmp_path / "fading.py"
    path.write_text(FADING)
    return f"{path}:FadingAttention"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with both strategies as its entry points."""
    site = tmp_path / "site"
    metadata = site / "strangers-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "strangers_work.py").write_text(TOVA + FADING.partition("import Eviction\n")[2])
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[sinkbench.strategies]\ntovas-twin = strangers_work:Tova\nfading = strangers_work:FadingAttention\n"
    )
    monkeypatch.syspath_prepend(site)


def nll(folder, stem):
    return list(pd.read_csv(folder / f"{stem}.csv").nll)


def test_tova_of_a_stranger_is_tova(here, tova, tmp_path):
    assert len(TOVA.splitlines()) <= 25
    for folder, experiment in (("theirs", tova), ("ours", "tova")):
        options = ("--experiment", experiment, "--attention-sink-size", 0)
        assert here(*run(tmp_path / folder, *options))[0] == 0
    theirs = nll(tmp_path / "theirs", "tova")
    assert theirs == nll(tmp_path / "ours", "tova")
    published = pd.read_csv(GOLDEN / "eviction" / "tova_llama.csv").nll
    assert theirs == pytest.approx(list(published), abs=1e-3)


def test_named_by_file_or_by_entry_point_it_gives_the_same(here, fading, installed, tmp_path):
    parameters = ("--set", "fade=0.5", "--set", "recent=3", "--num-tokens", 90)
    assert here(*run(tmp_path / "file", "--experiment", fading, *parameters))[0] == 0
    assert here(*run(tmp_path / "point", "--experiment", "fading", *parameters))[0] == 0
    by_file = nll(tmp_path / "file", "fading_attention-recent_3-fade_0.5")
    assert by_file == nll(tmp_path / "point", "fading-recent_3-fade_0.5")
    assert here(*run(tmp_path / "other", "--experiment", "fading", "--num-tokens", 90))[0] == 0
    assert by_file != nll(tmp_path / "other", "fading")
    status, out, _ = here("strategies")
    assert status == 0
    assert "tovas-twin" in out
    assert "strangers" in out


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("name", ["tova", "fading"])
def test_it_goes_on_where_it_was_cut(name, positions, here, request, tmp_path):
    options = ("--experiment", request.getfixturevalue(name), "--positions", positions, "--num-tokens", 90)
    assert here(*run(tmp_path / "whole", *options))[0] == 0
    assert here(*run(tmp_path / "cut", *options))[0] == 0
    (whole,), (csv,) = ((tmp_path / folder).glob("*.csv") for folder in ("whole", "cut"))
    cut(csv, 61, "62,1.")
    status, _, error = here(*run(tmp_path / "cut", *options, "--resume"))
    assert status == 0, error
    assert list(pd.read_csv(csv).nll) == pytest.approx(list(pd.read_csv(whole).nll), abs=1e-6)
    assert json.loads(csv.with_suffix(".json").read_text())["resumed_at"] == [61]


def test_a_run_is_not_continued_with_another_source(here, fading, tmp_path):
    options = run(tmp_path / "out", "--experiment", fading, "--num-tokens", 60)
    assert here(*options)[0] == 0
    cut(tmp_path / "out" / "fading_attention.csv", 40)
    (tmp_path / "fading.py").write_text(FADING.replace("0.75", "0.8"))
    status, _, error = here(*options, "--resume")
    assert (status, len(error.splitlines())) == (2, 1), error


def test_a_sweep_runs_it_beside_built_in_ones(here, tova, fading, tmp_path):
    options = {**MODEL, "window_size": [16, 32], "num_tokens": 60, "output_dir": str(tmp_path / "out")}
    lines = [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    entry = f"{{ name = {json.dumps(fading)}, fade = 0.5 }}"
    lines.append(f'experiment = ["h2o", {json.dumps(tova)}, {json.dumps(fading)}, {entry}]')
    file = tmp_path / "own.toml"
    file.write_text("\n".join(lines) + "\n")
    status, _, error = here("sweep", file)
    assert status == 0, error
    found = {path.stem for path in (tmp_path / "out").rglob("*.csv")}
    stems = ("h2o", "tova", "fading_attention", "fading_attention-fade_0.5")
    assert found == {f"{stem}-window_{window}" for stem in stems for window in (16, 32)}
    assert here("sweep", file)[1].count("was there") == 8
    alone = ("--experiment", fading, "--attention-sink-size", 0, "--num-tokens", 60)
    assert here(*run(tmp_path / "alone", *alone))[0] == 0
    swept = nll(tmp_path / "out", "fading_attention-window_32")
    assert swept == nll(tmp_path / "alone", "fading_attention")
