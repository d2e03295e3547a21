"""On a real model, the loss of copies sets in where the window ends."""

import json

import numpy as np
import pytest
from planted import planted_tokens, saved_tokens

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(900)]
LENGTH, WINDOW = 6000, 512


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The embedded model over a text with planted copies, dense and with a window; 8,192 tokens are its limit."""
    from sinkbench.cli import main

    out = tmp_path_factory.mktemp("planted")
    vocabulary = np.arange(1000, 20_000)
    data = saved_tokens(planted_tokens(vocabulary, LENGTH, far=12), out / "planted.jsonl")
    for strategy in ("transformers", "windowed", "attention_sinks"):
        text = ["--dataset-name", data, "--data-column", "input_ids", "--num-tokens", LENGTH - 1]
        how = ["--window-size", WINDOW, "--engine", "parallel", "--output-dir", out / "runs"]
        main([str(part) for part in ("run", "--experiment", strategy, *text, *how)])
    return out / "runs"


@pytest.mark.parametrize("strategy", ["windowed", "attention_sinks"])
def test_the_loss_of_planted_copies_sets_in_within_a_tenth_of_the_window(strategy, results, here):
    document = json.loads(here("compare", results, "--by", "recall-distance", "--format", "json")[1])
    about = next(row for row in document["runs"] if row["run"] == strategy)
    assert about["onset"] == pytest.approx(WINDOW, rel=0.1)
    rows = {row["tokens_back"]: row for row in document["recall"] if row["run"] == strategy}
    assert rows["beyond the window"]["loss_low"] > rows["within the window"]["loss_high"] + 1
