"""As a newcomer runs it: the embedded model and text, offline. The lines of README and Makefile: test_documents.py."""

import pandas as pd
import pytest

from sinkbench.cli import main

EXPERIMENTS = ("transformers", "windowed", "attention_sinks")


def run_all(folder, window, tokens):
    for experiment in EXPERIMENTS:
        sizes = ["--num-tokens", str(tokens), "--window-size", str(window)]
        main(["run", "--experiment", experiment, "--engine", "parallel", *sizes, "--output-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """384 tokens in parallel, window 64, every strategy."""
    return run_all(tmp_path_factory.mktemp("embedded"), 64, 384)


def late(folder, first):
    """The mean NLL of each strategy from a token on."""
    return {path.stem: pd.read_csv(path).nll[first:].mean() for path in folder.glob("*.csv")}


def test_the_installed_command_runs_without_a_word_on_standard_error(sinkbench, tmp_path):
    done = sinkbench("run", "--num-tokens", "24", "--window-size", "16", "--output-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "24" in done.stdout
    assert (pd.read_csv(tmp_path / "attention_sinks.csv").latency > 0).all()


def test_the_window_collapses_and_the_sinks_hold(runs):
    found = late(runs, 192)
    assert found["windowed"] > found["transformers"] + 1
    assert found["attention_sinks"] < found["transformers"] + 0.3


@pytest.mark.heavy
def test_sinks_cost_less_the_wider_the_window(tmp_path):
    found = late(run_all(tmp_path, 256, 1024), 512)
    assert found["windowed"] > found["transformers"] + 0.5
    assert found["attention_sinks"] < found["transformers"] + 0.15


def test_token_by_token_gives_the_same_numbers(runs, here, tmp_path):
    status, _, error = here("run", "--num-tokens", "100", "--window-size", "64", "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    steps = pd.read_csv(tmp_path / "attention_sinks.csv")
    difference = (steps.nll - pd.read_csv(runs / "attention_sinks.csv").nll[:100]).abs()
    assert difference.max() <= 1e-3
    assert difference.mean() <= 1e-5


def test_the_figure_and_the_comparison_follow(runs, here):
    status, _, error = here("plot", "--output_dir", runs, "--features", "perplexity", "vram")
    assert status == 0, error
    assert (runs / "perplexity_vram.png").read_bytes().startswith(b"\x89PNG")
    status, out, error = here("compare", runs)
    assert status == 0, error
    assert "attention_sinks" in out
    assert "fails" in out  # the line may break behind it
