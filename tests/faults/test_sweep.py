"""A sweep survives its cells: one that cannot run has failed, in one line, and the others run."""

import json
import os
import shutil

import pandas as pd
import pytest
from golden import GOLDEN

from sinkbench.cli import main

LLAMA = GOLDEN / "llama"
LONG = "x" * 3000


def written(folder, **changes):
    """An experiment file over tiny cells."""
    options = {
        "model_name_or_path": str(LLAMA),
        "dataset_name": str(LLAMA / "tokens.jsonl"),
        "data_column": "input_ids",
        "experiment": ["windowed", "attention_sinks"],
        "window_size": 16,
        "dtype": "float32",
        "num_tokens": 30,
        "output_dir": str(folder / "out"),
    }
    file = folder / "tiny.toml"
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in {**options, **changes}.items()))
    return file


@pytest.fixture
def sweep(here, tmp_path):
    """Sweeps over tiny cells, one line of the answer for each."""

    def call(**changes):
        status, _, error = here("sweep", written(tmp_path, **changes), "--retries", 0)
        return status, error.splitlines()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The results of such a sweep."""
    folder = tmp_path_factory.mktemp("finished")
    main(["sweep", str(written(folder))])
    return folder / "out"


@pytest.fixture
def done(finished, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(finished, tmp_path / "out")


def configured(folder, **changes):
    """The golden model, with another configuration."""
    shutil.copytree(LLAMA, folder)
    config = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def dangling(folder):
    shutil.copytree(LLAMA, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")


def looping(folder):
    shutil.copytree(LLAMA, folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


def folder_of_weights(folder):
    shutil.copytree(LLAMA, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


MODELS = {
    "dangling": dangling,
    "looping": looping,
    "weights_folder": folder_of_weights,
    "no_heads": lambda folder: configured(folder, num_attention_heads=0),
    "no_rope": lambda folder: configured(folder, rope_parameters="x"),
    "no_layers": lambda folder: configured(folder, layer_types=["nonsense", "nonsense"]),
    "no_size": lambda folder: configured(folder, hidden_size=[1]),
}


def fates(lines):
    """Whether the cell of each folder has failed, by the line that says so."""
    return {line.partition("/")[0]: ": failed: " in line for line in lines}


def test_a_model_that_cannot_be_had_fails_alone(sweep, tmp_path):
    for name, make in MODELS.items():
        make(tmp_path / name)
    status, lines = sweep(
        model_name_or_path=[str(LLAMA), *(str(tmp_path / name) for name in MODELS)], experiment="windowed"
    )
    assert status == 1
    assert len(lines) == len(MODELS) + 1
    assert fates(lines) == {"llama": False} | dict.fromkeys(MODELS, True), lines


@pytest.mark.parametrize("axis", ["model_name_or_path", "dataset_name"])
def test_a_name_that_no_file_can_have_fails_alone(axis, sweep):
    good = LLAMA if axis == "model_name_or_path" else LLAMA / "tokens.jsonl"
    names = [LONG, f"./{LONG}z", f"{LONG}.jsonl"]
    status, lines = sweep(**{axis: [*names, str(good)]}, experiment="windowed")
    assert status == 1
    assert [": failed: " in line for line in lines] == [True] * 3 + [False], lines


def test_a_text_that_leads_nowhere_fails_alone(sweep, tmp_path):
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "folder.jsonl").mkdir()
    names = [str(tmp_path / "gone.jsonl"), str(tmp_path / "folder.jsonl"), str(LLAMA / "tokens.jsonl")]
    status, lines = sweep(dataset_name=names, experiment="windowed")
    assert status == 1
    assert [": failed: " in line for line in lines] == [True, True, False], lines


@pytest.mark.parametrize("name", ["windowed.csv", "windowed.json", ".windowed.json.part"])
@pytest.mark.parametrize("kind", ["folder", "link to nowhere", "pipe"])
def test_what_is_in_the_way_of_a_result_fails_it_alone(name, kind, sweep, tmp_path):
    place = tmp_path / "out" / name
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(tmp_path / "nowhere" / "file")
    status, lines = sweep()
    failed = [": failed: " in line for line in lines]
    if name == "windowed.json" and kind == "pipe":  # it is replaced
        assert (status, failed) == (0, [False, False])
        return
    assert (status, failed) == (1, [True, False]), lines
    assert lines[1].endswith("finished")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": "x"},
        {"rows": [1], "seconds": {}},
        {"exit_reason": ["finished"]},
        {"key": 7},
        {"timed_rows": "all", "rows": 20},
        {"sessions": [1], "rows": 20},
        {"sessions": {"a": 1}, "rows": 20},
        {"seconds": "long", "rows": 20},
        {"resumed_at": 3, "rows": 20},
        {"determined_by": 5},
        {"overall_ppl": "good"},
    ],
)
def test_a_record_of_nonsense_is_no_result_and_fails_alone_at_most(changes, done, sweep, tmp_path):
    path = tmp_path / "out" / "windowed.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    rows = (tmp_path / "out" / "windowed.csv").read_bytes()
    status, lines = sweep()
    assert status in (0, 1)
    assert len(lines) == 2
    assert any("attention_sinks: was there: finished" in line for line in lines)
    if status:
        assert sum(": failed: cannot go on with" in line for line in lines) == 1
        assert (tmp_path / "out" / "windowed.csv").read_bytes() == rows
    else:
        assert len(pd.read_csv(tmp_path / "out" / "windowed.csv")) == 30


@pytest.mark.parametrize("text", ["", "[1]", "null", '"x"', "[" * 100_000, "\xff"])
def test_a_record_that_is_none_is_no_result(text, done, sweep, tmp_path):
    (tmp_path / "out" / "windowed.json").write_text(text, encoding="latin-1")
    status, lines = sweep()
    assert status == 1
    assert [": failed: cannot go on with" in line for line in lines].count(True) == 1


def test_files_of_others_do_not_stop_it(sweep, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.mkfifo(out / "pipe.json")
    (out / "pipe.csv").touch()
    (out / "gone.json").symlink_to("nowhere")
    (out / "round.json").symlink_to("round.json")
    (out / "folder.json").mkdir()
    assert sweep()[0] == 0


def test_a_strategy_that_trips_fails_alone(sweep, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from sinkbench.strategies import Policy, Strategy\n\n\nclass Mine(Strategy):\n"
        "    def policy(self, window, layer=0, layers=1):\n"
        "        return Policy(window) if layers == 1 else 1 / 0\n"
    )
    status, lines = sweep(experiment=[f"{tmp_path / 'mine.py'}:Mine", "windowed"])
    assert status == 1
    assert [": failed: " in line and "ZeroDivisionError" in line for line in lines] == [True, False], lines


def test_estimates_of_the_others_are_shown(here, tmp_path):
    configured(tmp_path / "bad", num_attention_heads=0)
    file = tmp_path / "tiny.toml"
    models = json.dumps([str(tmp_path / "bad"), str(LLAMA)])
    file.write_text(f'model_name_or_path = {models}\nwindow_size = 16\noutput_dir = "{tmp_path / "out"}"\n')
    status, out, _ = here("sweep", file, "--dry-run")
    assert (status, "no estimate for" in out, "GiB" in out) == (0, True, True)
