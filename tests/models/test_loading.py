"""A model that is damaged, incomplete or not what it says is refused before the first row, in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gguf import GGUFWriter
from golden import GOLDEN, golden_options
from safetensors.torch import load_file, save_file

from sinkbench.config import ModelSource
from sinkbench.models import gguf as unpacked
from sinkbench.models.loading import load_model, locate

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PROJECTION = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """The golden model, to be damaged."""
    return shutil.copytree(GOLDEN / "llama", tmp_path / "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where GGUF files are unpacked."""
    monkeypatch.setenv("SINKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def line(model, out):
    return ["run", *golden_options("llama"), "--model-name-or-path", model, "--output-dir", out, "--num-tokens", "60"]


@pytest.fixture
def run(here, tmp_path):
    """The first 60 NLLs of a model."""

    def call(model, *options):
        status, _, error = here(*line(model, tmp_path / "ok"), "--overwrite", *options)
        assert status == 0, error
        return list(pd.read_csv(tmp_path / "ok" / "attention_sinks.csv").nll)

    return call


@pytest.fixture
def refused(here, tmp_path):
    """Exit status 2, one line with these words, no result."""

    def call(model, *words, options=()):
        status, _, error = here(*line(model, tmp_path / "o"), *options)
        assert status == 2, error
        assert len(error.strip().splitlines()) == 1, error
        for word in (str(model), *words):
            assert word in error
        assert not list((tmp_path / "o").glob("*"))

    return call


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def shard(folder: Path) -> list[Path]:
    """Two shards and their index in place of the one file."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    keys = sorted(weights)
    halves = {"model-1-of-2.safetensors": keys[::2], "model-2-of-2.safetensors": keys[1::2]}
    for name, half in halves.items():
        save_file({key: weights[key] for key in half}, folder / name, metadata={"format": "pt"})
    places = {key: name for name, half in halves.items() for key in half}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return [folder / name for name in halves]


# Safetensors


@pytest.mark.parametrize("place", [0, 5, 9, 40, 300])
def test_flipped_bytes_in_the_header_are_noticed(place, folder, refused):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[place] ^= 0xFF
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, "damaged", "download or copy")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_weights_are_noticed(share, folder, refused):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    refused(folder, "damaged or cut short", "download or copy")


def test_shards_are_as_good_as_one_file(folder, run):
    whole = run(folder)
    shard(folder)
    assert run(folder) == pytest.approx(whole, abs=1e-5)


def test_a_missing_or_truncated_shard_is_noticed(folder, refused):
    first, second = shard(folder)
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    refused(folder, "cut short")
    first.write_bytes(whole)
    second.unlink()
    refused(folder, second.name, "missing")


def test_an_index_that_leads_nowhere_is_noticed(folder, refused):
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "nowhere.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "nowhere.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"metadata": {}, "weight_map": {}}', '{"metadata": {}}'])
def test_a_damaged_index_is_noticed(content, folder, refused):
    shard(folder)
    (folder / INDEX).write_text(content)
    refused(folder, "download or copy")


# What the configuration says


@pytest.mark.parametrize("content", [b"", b"not json", b"\xff\xfe\x00", b"[]", b"{}", b"null", b'"text"'])
def test_a_garbled_configuration_is_noticed(content, folder, refused):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_missing_file_is_named(name, folder, refused):
    (folder / name).unlink()
    refused(folder, name)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 128}, ["[512, 64]", "[512, 128]"]),
        ({"vocab_size": 600}, ["lm_head.weight", "[600, 64]"]),
        ({"num_hidden_layers": 4}, ["lacks model.layers.3", "would be random"]),
        ({"num_hidden_layers": 2}, ["holds model.layers.2", "no place"]),
        ({"attention_bias": True}, ["lacks model.layers.0.self_attn.k_proj.bias"]),
        ({"model_type": "nonesuch"}, ["nonesuch"]),
        ({"hidden_size": "many"}, ["hidden_size"]),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(values, words, folder, refused):
    configure(folder, **values)
    refused(folder, *words)


# The weights themselves


def test_a_missing_weight_is_refused_rather_than_drawn_at_random(folder, refused):
    rewrite(folder, lambda weights: weights.pop(PROJECTION))
    refused(folder, PROJECTION, "random")


def test_a_weight_without_a_place_is_refused(folder, refused):
    rewrite(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    refused(folder, "q_proj.bias", "no place")


def test_buffers_of_older_code_are_no_obstacle(folder, run):
    whole = run(folder)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "v_head.summary.weight": torch.ones(1, 64)}
    rewrite(folder, lambda weights: weights.update(old))
    assert run(folder) == pytest.approx(whole, abs=1e-5)


def test_a_tied_output_layer_is_not_missing(folder):
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    configure(folder, tie_word_embeddings=True)
    model = load_model(locate(ModelSource(str(folder))))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value, folder, refused):
    def spoil(weights):
        weights[PROJECTION][3, 3] = value

    rewrite(folder, spoil)
    refused(folder, PROJECTION, "NaN or infinity")


def test_pickles_in_a_folder_are_read_only_when_asked_for(folder, run, refused):
    whole = run(folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    refused(folder, "--allow-pickle")
    assert run(folder, "--allow-pickle") == pytest.approx(whole, abs=1e-5)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    refused(folder, "pickle", options=["--allow-pickle"])


def test_a_missing_tokenizer_is_named_when_text_is_read(folder, here, tmp_path):
    (tmp_path / "text.txt").write_text("some text " * 20)
    options = ["--model-name-or-path", folder, "--dataset-name", tmp_path / "text.txt", "--output-dir", tmp_path / "o"]
    status, _, error = here("run", *options, "--num-tokens", "20", "--window-size", "8")
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    assert "tokenizer" in error
    assert str(folder) in error
    assert not list((tmp_path / "o").glob("*"))


# GGUF


def gguf_names(layers: int) -> dict[str, str]:
    """Names of Llama's weights in GGUF, by those in transformers."""
    inside = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    inside |= {f"self_attn.{short}_proj": f"attn_{short}" for short in "qkv"} | {"self_attn.o_proj": "attn_output"}
    inside |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("up", "gate", "down")}
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layered = {f"model.layers.{i}.{hf}": f"blk.{i}.{short}" for i in range(layers) for hf, short in inside.items()}
    return {f"{hf}.weight": f"{short}.weight" for hf, short in (outside | layered).items()}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in GGUF's order for rotary positions: pairs side by side."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def gguf(tmp_path):
    return write_gguf(tmp_path / "llama.gguf")


def write_gguf(path: Path, without: str | None = None) -> Path:
    """The golden model in one GGUF file, with a tokenizer that is just enough."""
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    heads, few = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(few)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "2", *(f"t{i}" for i in range(1, config["vocab_size"] - 2))])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 1", "t 2"])
    weights = {key: value.numpy() for key, value in load_file(GOLDEN / "llama" / WEIGHTS).items()}
    for key, name in gguf_names(config["num_hidden_layers"]).items():
        if key == without:
            continue
        turned = {"q_proj": heads, "k_proj": few}.get(key.split(".")[-2])
        writer.add_tensor(name, permuted(weights[key], turned) if turned else weights[key])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_gives_the_numbers_of_its_safetensors(gguf, run):
    assert run(gguf) == pytest.approx(run(GOLDEN / "llama"), abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_gguf_file_is_noticed(share, gguf, refused, cache):
    content = gguf.read_bytes()
    gguf.write_bytes(content[: int(share * len(content))])
    refused(gguf, "not a whole GGUF file", "download or copy")
    assert not list(cache.glob("*"))


def test_a_gguf_file_without_one_of_its_weights_is_refused(refused, tmp_path, cache):
    refused(write_gguf(tmp_path / "less.gguf", without=PROJECTION), PROJECTION, "random")
    assert not list(cache.glob("*"))


def test_a_gguf_file_of_zeros_is_noticed(gguf, refused):
    gguf.write_bytes(b"\0" * 10_000)
    refused(gguf, "not a whole GGUF file")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no configuration", "never finished"])
def test_a_damaged_unpacked_folder_is_unpacked_anew(damage, gguf, run, cache):
    before = run(gguf)
    (kept,) = cache.iterdir()
    content = (kept / WEIGHTS).read_bytes()
    if damage == "truncated":
        (kept / WEIGHTS).write_bytes(content[:-1000])
    elif damage == "flipped":
        (kept / WEIGHTS).write_bytes(content[:-500] + bytes([content[-500] ^ 0x40]) + content[-499:])
    elif damage == "never finished":
        (kept / unpacked.SUMS).unlink()
    else:
        (kept / (WEIGHTS if damage == "missing" else "config.json")).unlink()
    assert run(gguf) == before
    assert (kept / WEIGHTS).read_bytes() == content
    assert list(cache.iterdir()) == [kept]


def test_an_unpacked_folder_is_used_again(gguf, run, cache):
    run(gguf)
    (kept,) = cache.iterdir()
    written = (kept / WEIGHTS).stat().st_mtime_ns
    run(gguf)
    assert (kept / WEIGHTS).stat().st_mtime_ns == written


def test_another_file_of_the_same_name_size_and_time_is_unpacked_anew(gguf, run, cache, tmp_path):
    before = run(gguf)
    about, content = gguf.stat(), bytearray(gguf.read_bytes())
    content[-2000:-1000] = content[-1000:]
    gguf.write_bytes(content)
    os.utime(gguf, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run(gguf) != before


def test_a_file_of_that_name_in_the_current_folder_is_not_taken_for_it(gguf, run, monkeypatch, tmp_path):
    before = run(gguf)
    here = tmp_path / "here"
    here.mkdir()
    (here / gguf.name).write_bytes(b"no model")
    monkeypatch.chdir(here)
    monkeypatch.setattr(unpacked, "LIMIT", 0)
    assert run(gguf) == pytest.approx(before, abs=1e-5)


def test_what_a_killed_process_left_behind_is_cleared_after_a_day(gguf, run, cache):
    old, new = cache / ".unpacking-old", cache / ".unpacking-new"
    for left in (old, new):
        left.mkdir(parents=True)
    os.utime(old, (0, 0))
    run(gguf)
    assert not old.exists()
    assert new.exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(gguf, run, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    before = run(gguf)
    monkeypatch.setenv("SINKBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert run(gguf) == pytest.approx(before, abs=1e-5)
