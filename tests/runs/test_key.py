"""What a key knows of a model's files, and what a device is called."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import GOLDEN
from resuming import run
from safetensors.torch import load_file, save_file

from sinkbench.config import ModelSource, RunConfig
from sinkbench.errors import UserError
from sinkbench.models.loading import Checkpoint, load_model, locate
from sinkbench.runs import run as runs
from sinkbench.runs.key import weights_of
from sinkbench.runs.record import device_name
from sinkbench.sweeps.launchers.local import Shelf


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


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of its own."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sharded(folder: Path, index: str = "model.safetensors.index.json") -> Path:
    """Let the weights of a model lie in a folder below it, where an index finds them; the file."""
    weights = folder / "model.safetensors"
    shard = folder / "parts" / "one.safetensors"
    shard.parent.mkdir()
    names = list(load_file(weights))
    weights.rename(shard)
    (folder / index).write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "parts/one.safetensors")})
    )
    return shard


def other(weights: Path) -> None:
    """Other numbers in a file of weights, of the same size and time."""
    about = weights.stat()
    save_file({key: 1.01 * value for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("explicit", [False, True])
def test_shards_in_folders_below_count(explicit: bool, model: Path) -> None:
    shard = sharded(model, "other.safetensors.index.json" if explicit else "model.safetensors.index.json")
    if explicit:
        edited(model / "config.json", transformers_weights="other.safetensors.index.json")
    found = locate(ModelSource(str(model)))
    load_model(found)  # it is a model
    before = weights_of(found)
    other(shard)
    assert weights_of(found) != before


def test_a_file_of_weights_that_the_configuration_names_counts(model: Path) -> None:
    weights = model / "below" / "named.safetensors"
    weights.parent.mkdir()
    (model / "model.safetensors").rename(weights)
    edited(model / "config.json", transformers_weights="below/named.safetensors")
    found = locate(ModelSource(str(model)))
    load_model(found)
    before = weights_of(found)
    other(weights)
    assert weights_of(found) != before


def test_a_resumed_run_does_not_go_on_with_other_shards(model: Path, here: Callable, tmp_path: Path) -> None:
    shard = sharded(model)
    line = [*run(tmp_path / "out", "--num-tokens", 50), "--model-name-or-path", str(model)]
    assert here(*line)[0] == 0
    other(shard)
    status, _, error = here(*line, "--num-tokens", 100, "--resume")
    assert (status, "whose weights was" in error) == (2, True)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("config.9.0.0.json", {}),  # which transformers may take for its version
    ],
)
def test_a_configuration_counts(file: str, change: dict[str, Any], model: Path) -> None:
    found = locate(ModelSource(str(model)))
    before = weights_of(found)
    if file != "config.json":
        shutil.copy(model / "config.json", model / file)
    edited(model / file, **change)
    assert weights_of(found) != before


def test_another_file_behind_a_link_counts(model: Path) -> None:
    weights, elsewhere = model / "model.safetensors", model.parent / "elsewhere.safetensors"
    shutil.copy2(weights, elsewhere)
    weights.unlink()
    weights.symlink_to(elsewhere)
    found = locate(ModelSource(str(model)))
    before = weights_of(found)
    another = Path(shutil.copy2(elsewhere, model.parent / "another.safetensors"))
    other(another)
    weights.unlink()
    weights.symlink_to(another)
    assert weights_of(found) != before


def test_links_that_lead_nowhere_and_folders_called_as_weights_are_none(model: Path) -> None:
    found = locate(ModelSource(str(model)))
    before = weights_of(found)
    (model / "gone.safetensors").symlink_to("nowhere")
    (model / "folder.bin").mkdir()
    assert weights_of(found) == before


def test_code_that_a_trusted_model_takes_from_elsewhere_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(model / "config.json", auto_map={"AutoModelForCausalLM": "someone/code--modeling.Model"})
    commits = iter(["1" * 40, "2" * 40])
    monkeypatch.setattr("sinkbench.models.hub.pin", lambda kind, name, revision: Pin(next(commits)))
    trusted, plain = (locate(ModelSource(str(model), trust_remote_code=trust)) for trust in (True, False))
    keys = [weights_of(trusted), weights_of(trusted), weights_of(plain)]
    assert len(set(keys)) == 3
    assert "someone/code@" + "1" * 40 in keys[0]


class Pin:
    def __init__(self, commit: str) -> None:
        self.commit = commit


def test_a_models_code_counts_in_folders_below_too(model: Path) -> None:
    found = locate(ModelSource(str(model), trust_remote_code=True))
    before = weights_of(found)
    (model / "below").mkdir()
    (model / "below" / "layers.py").write_text("EPSILON = 1\n")
    assert weights_of(found) != before


def test_weights_that_change_while_they_are_read_are_refused(model: Path, tmp_path: Path) -> None:
    def changing(checkpoint: Checkpoint) -> Any:
        loaded = load_model(checkpoint)
        other(model / "model.safetensors")
        return loaded

    options = RunConfig(
        model_name_or_path=str(model),
        dataset_name=str(model / "tokens.jsonl"),
        data_column="input_ids",
        output_dir=tmp_path / "out",
        num_tokens=20,
    )
    with pytest.raises(UserError, match="were changed while they were read"):
        runs.run(options, load=changing)
    assert not list((tmp_path / "out").iterdir())


def test_a_sweep_does_not_go_on_with_a_model_whose_files_have_changed(model: Path) -> None:
    shelf, found = Shelf(), locate(ModelSource(str(model)))
    before = shelf.load(found).lm_head.weight.clone()
    assert torch.equal(shelf.load(found).lm_head.weight, before)
    other(model / "model.safetensors")
    assert not torch.equal(shelf.load(found).lm_head.weight, before)


def test_an_adapter_is_refused(model: Path, here: Callable, tmp_path: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    status, _, error = here(*run(tmp_path / "out"), "--model-name-or-path", str(model))
    assert (status, "holds an adapter" in error) == (2, True)
