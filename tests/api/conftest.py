"""A model that carries the strategy."""

from collections.abc import Iterator

import pytest
import tiny
from dropin import SIZES
from transformers import PreTrainedModel

from sinkbench import attention_sinks


@pytest.fixture
def llama() -> Iterator[PreTrainedModel]:
    with attention_sinks(tiny.shared("llama"), **SIZES) as model:
        yield model
