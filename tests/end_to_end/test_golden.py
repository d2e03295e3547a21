"""The published package is the definition of correct: every row, through the command line."""

import pandas as pd
import pytest
from golden import GOLDEN, golden_options

TOLERANCE = 2e-4


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize("experiment", ["transformers", "windowed", "attention_sinks"])
@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_every_row_agrees_with_the_published_package(family, experiment, engine, here, tmp_path):
    status, _, error = here(
        "run", "--experiment", experiment, "--engine", engine, *golden_options(family), "--output-dir", tmp_path
    )
    assert (status, error) == (0, "")
    ours = pd.read_csv(tmp_path / f"{experiment}.csv")
    reference = pd.read_csv(GOLDEN / family / "reference.csv")
    assert list(ours.input_length) == list(reference.input_length)
    assert list(ours.token) == list(reference.label)
    assert (ours.nll - reference[f"nll_{experiment}"]).abs().max() <= TOLERANCE
