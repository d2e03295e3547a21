"""What cannot work with attention sinks is one clear error."""

import gc

import pytest
import tiny
import torch
import transformers
from dropin import SIZES

from sinkbench import SinkCache, attention_sinks
from sinkbench.api.forward import read
from sinkbench.errors import UserError


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation does not work with attention sinks"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search does not work with attention sinks"),
        ({"dola_layers": "high"}, "dola generation does not work with attention sinks"),
        ({"cache_implementation": "static"}, "cache_implementation='static' does not go with attention sinks"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' does not go"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8 does not go with attention sinks"),
        ({"attention_mask": torch.tensor([[1] * 29 + [0]])}, "padding must be on the left"),
    ],
)
def test_what_cannot_work_is_a_clear_error(llama, asked, told):
    with pytest.raises(UserError, match=told):
        llama.generate(tiny.tokens(30)[None], max_new_tokens=3, **asked)


def test_an_assistant_model_is_a_clear_error(llama):
    with pytest.raises(UserError, match="assisted generation does not work"):
        llama.generate(tiny.tokens(30)[None], assistant_model=tiny.shared("mistral"), max_new_tokens=3)


@pytest.mark.parametrize("family", tiny.LEARNED)
def test_models_that_cannot_stream_are_refused_when_they_are_given_the_strategy(family):
    model = tiny.LEARNED[family]()
    before = vars(model).copy()
    with pytest.raises(UserError, match="learns absolute positions"), attention_sinks(model):
        pass
    with pytest.raises(UserError, match="learns absolute positions"):
        SinkCache(model)
    gc.collect()
    assert vars(model).copy() == before


@pytest.mark.parametrize("sizes", [(-1, 10), (4, 0), (4, 1.5), (True, 10), ("4", 10)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(UserError, match=r"attention_sink_(window_)?size must be a whole number"):
        SinkCache(tiny.shared("llama"), *sizes)


def test_caches_of_others_are_refused(llama):
    stream = tiny.tokens(30)[None]
    with pytest.raises(UserError, match="made for another model"):
        llama(stream, past_key_values=SinkCache(tiny.ROTARY["llama"](), **SIZES))
    theirs = transformers.DynamicCache()
    theirs.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(UserError, match="DynamicCache cannot keep"):
        llama(stream, past_key_values=theirs)
    with pytest.raises(UserError, match="call the model itself"):
        llama.model(stream, past_key_values=SinkCache(llama, **SIZES))
    with pytest.raises(UserError, match="does not go with 1 rows of 30 tokens"):
        llama(stream, attention_mask=torch.ones(1, 20))
    with pytest.raises(UserError, match="input_ids or inputs_embeds"):
        read(llama, llama.forward, SinkCache(llama), {})
