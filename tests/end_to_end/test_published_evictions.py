"""Scoring strategies and caches in few bits agree with the published code at every row, through the command line."""

import pandas as pd
import pytest
from golden import GOLDEN

TOLERANCE = 1e-3
EVICTION = GOLDEN / "eviction"


@pytest.mark.parametrize(
    ("reference", "model", "tokens", "options"),
    [
        ("tova_llama", "llama", GOLDEN / "llama" / "tokens.jsonl", ["--experiment", "tova"]),
        (
            "h2o_llama_mha",
            "llama_mha",
            GOLDEN / "llama" / "tokens.jsonl",
            ["--experiment", "h2o", "--set", "recent=20"],
        ),
        (
            "kivi_2bit_llama_mha",
            "llama_mha",
            GOLDEN / "llama" / "tokens.jsonl",
            ["--experiment", "transformers", "--kv-format", "kivi2:group=16,residual=32"],
        ),
        ("keydiff_llama_distinct", "llama", EVICTION / "tokens_distinct.jsonl", ["--experiment", "keydiff"]),
    ],
)
@pytest.mark.parametrize("engine", [[], ["--engine", "parallel", "--chunk-size", 37], ["--engine", "parallel"]])
def test_every_row_agrees_with_the_published_code(reference, model, tokens, options, engine, here, tmp_path):
    source = ["--model-name-or-path", GOLDEN / model, "--dataset-name", tokens, "--data-column", "input_ids"]
    status, _, error = here("run", *options, *engine, *source, "--window-size", 32, "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    (csv,) = tmp_path.glob("*.csv")
    ours, published = pd.read_csv(csv), pd.read_csv(EVICTION / f"{reference}.csv")
    assert list(ours.input_length) == list(published.input_length)
    assert (ours.nll - published.nll).abs().max() <= TOLERANCE
