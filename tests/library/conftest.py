"""A small model as an object, and the tokens that it was made for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import GOLDEN

import sinkbench
from sinkbench.config import ModelSource
from sinkbench.models.loading import load_model, locate
from sinkbench.results.run import Run

FOLDER = GOLDEN / "llama"
NAMED = {"model_name_or_path": FOLDER, "dataset_name": FOLDER / "tokens.jsonl", "data_column": "input_ids"}
SIZES = {"window_size": 32, "num_tokens": 60}


@pytest.fixture
def llama() -> Any:
    """The golden Llama, loaded as for a run."""
    return load_model(locate(ModelSource(str(FOLDER), dtype="float32")))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Run]:
    """``sinkbench.run`` over the golden model and tokens, into a folder of this test."""

    def call(**options: Any) -> Run:
        return sinkbench.run(**{**NAMED, **SIZES, "output_dir": tmp_path, **options})

    return call
