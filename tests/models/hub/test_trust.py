"""No code that comes from the Hub runs unasked."""

import io
import json
import os
from pathlib import Path

import pytest
import torch
from hub_runs import LLAMA, LOCAL_IDS, LOCAL_MODEL, files, line, nll, parquet, refused, succeeded, tokenizer_files
from safetensors.torch import load


def remote_code(marker: Path) -> dict[str, bytes]:
    """A model whose class comes with it, and leaves a mark when it is imported."""
    code = f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(marker)!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
    config = json.loads((LLAMA / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    return files() | {"config.json": json.dumps(config).encode(), "own.py": code.encode()}


def test_code_of_a_model_runs_only_when_it_is_trusted(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    hub.commit("model", names[0], remote_code(marker))
    refused(shell(*line(names, out, *LOCAL_IDS)), out, names[0], "--trust-remote-code")
    assert not marker.exists()
    assert not hub.asked(r"GET .*own\.py")
    succeeded(shell(*line(names, out, *LOCAL_IDS, "--trust-remote-code")))
    assert marker.exists()
    succeeded(shell(*line(names, tmp_path / "l", *LOCAL_IDS, *LOCAL_MODEL)))
    assert nll(out) == pytest.approx(nll(tmp_path / "l"), abs=1e-5)


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    code = f"""
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({str(marker)!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
    content = tokenizer_files(tmp_path / "tokenizer")
    settings = json.loads(content["tokenizer_config.json"])
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    content |= {"tokenizer_config.json": json.dumps(settings).encode(), "own.py": code.encode()}
    hub.commit("model", names[0], files() | content)
    hub.commit("dataset", names[1], {"test.parquet": parquet({"input_ids": ["some text to read " * 10]})})
    refused(shell(*line(names, out)), out, "--trust-remote-code")
    assert not marker.exists()
    succeeded(shell(*line(names, out, "--trust-remote-code")))
    assert marker.exists()


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]])
def test_a_datasets_loading_script_is_never_run(trust, hub, shell, names, tmp_path):
    marker, script = tmp_path / "ran", names[1].split("/")[1] + ".py"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n".encode()
    hub.commit("dataset", names[1], {"README.md": b"# scripted\n", script: code})
    out = tmp_path / "o"
    refused(shell(*line(names, out, *LOCAL_MODEL, *trust)), out, names[1], "script", "--dataset-revision")
    assert not marker.exists()


def pickled(value) -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save(value, file)
    return {"config.json": files()["config.json"], "pytorch_model.bin": file.getvalue()}


def test_pickled_weights_are_read_only_when_asked_for_and_give_the_same_numbers(hub, shell, names, tmp_path):
    out = tmp_path / "o"
    hub.commit("model", names[0], pickled(load((LLAMA / "model.safetensors").read_bytes())))
    refused(shell(*line(names, out, *LOCAL_IDS)), out, names[0], "--allow-pickle")
    assert not hub.asked(r"GET .*\.bin")
    succeeded(shell(*line(names, out, *LOCAL_IDS, "--allow-pickle")))
    succeeded(shell(*line(names, tmp_path / "l", *LOCAL_IDS, *LOCAL_MODEL)))
    assert nll(out) == pytest.approx(nll(tmp_path / "l"), abs=1e-5)
    assert not hub.asked("discussions|commits")  # nobody is asked to convert them


def test_safetensors_are_preferred_to_pickles(hub, shell, names, tmp_path):
    hub.commit("model", names[0], files() | {"pytorch_model.bin": b"never read"})
    for number, options in enumerate(([], ["--allow-pickle"])):
        succeeded(shell(*line(names, tmp_path / str(number), *LOCAL_IDS, *options)))
    assert not hub.asked(r"GET .*\.bin")


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_program_in_a_pickle_is_not_run_even_then(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    hub.commit("model", names[0], pickled({"lm_head.weight": Trap(marker)}))
    refused(shell(*line(names, out, *LOCAL_IDS, "--allow-pickle")), out, names[0], "pickle", "safetensors")
    assert not marker.exists()
