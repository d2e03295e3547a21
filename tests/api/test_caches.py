"""Caches are copied, pickled, printed, indexed and used for many continuations of one prompt."""

import copy
import gc
import pickle

import pytest
import tiny
import torch
import transformers
from dropin import GREEDY, SIZES, padded, some_families

from sinkbench import SinkCache, attention_sinks
from sinkbench.errors import UserError

copies = pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, copy.copy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["deep", "copy", "pickle"],
)
strategies = pytest.mark.parametrize(
    "asked", [{}, {"strategy": "h2o"}, {"strategy": "tova", "positions": "cache"}, {"kv_format": "fp8_e4m3"}]
)


def carrying(tmp_path, family="llama", **asked):
    import sinkbench

    tiny.shared(family).save_pretrained(tmp_path)
    return sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **{**SIZES, **asked})


@copies
@some_families
def test_a_copy_goes_on_as_the_cache_itself_would_and_leaves_it_alone(family, twin_of):
    model, stream = tiny.STREAMABLE[family](), tiny.tokens(80)[None]
    with attention_sinks(model, **SIZES), torch.no_grad():
        past = model(stream[:, :50]).past_key_values
        twin, other = twin_of(past), twin_of(past)
        wanted = model(stream[:, 50:], past_key_values=past).logits
        assert torch.equal(model(stream[:, 50:], past_key_values=twin).logits, wanted)
        assert other.seen == 50
        assert torch.equal(model(stream[:, 50:], past_key_values=other).logits, wanted)


@strategies
@copies
def test_so_does_one_under_any_strategy(asked, twin_of, tmp_path):
    model, stream = carrying(tmp_path, **asked), tiny.tokens(60)[None]
    with torch.no_grad():
        past = model(stream[:, :40]).past_key_values
        twin = twin_of(past)
        wanted = model(stream[:, 40:], past_key_values=past).logits
        assert torch.equal(model(stream[:, 40:], past_key_values=twin).logits, wanted)


def test_what_is_pickled_is_keys_and_values_and_no_model():
    model = tiny.ROTARY["llama"](num_hidden_layers=4)
    with attention_sinks(model, attention_sink_window_size=508), torch.no_grad():
        past = model(tiny.tokens(700)[None]).past_key_values
    weights = sum(p.nbytes for p in model.parameters())
    assert past.nbytes > weights / 2
    assert len(pickle.dumps(past)) < 1.5 * past.nbytes
    assert copy.deepcopy(past).model is model
    assert pickle.loads(pickle.dumps(past)).model is None


def test_a_pickled_cache_object_works_with_its_model_once_it_is_attached():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(60)[None]
    before = vars(model).copy()
    cache = SinkCache(model, **SIZES)
    with torch.no_grad():
        model(stream[:, :40], past_key_values=cache)
        stored = pickle.dumps(cache)
        wanted = model(stream[:, 40:], past_key_values=cache).logits
        del cache
        gc.collect()
        assert vars(model) == before
        loaded = pickle.loads(stored)
        with pytest.raises(UserError, match=r"cache.attach\(model\) if it was unpickled"):
            model(stream[:, 40:], past_key_values=loaded)
        with pytest.raises(UserError, match="no model yet"):
            loaded.reset()
        loaded.attach(model)
        assert torch.equal(model(stream[:, 40:], past_key_values=loaded).logits, wanted)
    twin = copy.deepcopy(loaded)
    del loaded
    gc.collect()
    model(stream, past_key_values=twin)  # a copy holds on to what stands before the model's methods
    del twin
    gc.collect()
    assert vars(model) == before


def test_a_pickled_cache_is_refused_by_a_model_of_another_shape():
    one, other = tiny.ROTARY["llama"](), tiny.ROTARY["llama"](num_hidden_layers=3)
    loaded = pickle.loads(pickle.dumps(SinkCache(one, **SIZES)))
    with pytest.raises(UserError, match="other layers"):
        loaded.attach(other)
    loaded.attach(one)
    with pytest.raises(UserError, match="made for another model"):
        loaded.attach(tiny.ROTARY["llama"]())


@pytest.mark.parametrize("first", [10, 50])
@copies
def test_one_prompt_is_read_once_for_many_continuations(first, twin_of):
    """As "Reuse a cache" in transformers' documentation of its caches."""
    model, prompt = tiny.ROTARY["llama"](), tiny.tokens(first)[None]
    with attention_sinks(model, **SIZES):
        with torch.no_grad():
            empty = transformers.DynamicCache(config=model.config)
            initial = model(input_ids=prompt, past_key_values=empty).past_key_values
        for seed in range(3):
            ids = torch.cat((prompt, tiny.tokens(7, seed=seed)[None]), 1)
            wanted = model.generate(ids, max_new_tokens=9, **GREEDY)
            got = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=twin_of(initial), max_new_tokens=9, **GREEDY
            )
            assert torch.equal(got, wanted)


def test_one_prompt_is_read_once_for_a_batch():
    model, prompt = tiny.ROTARY["llama"](), tiny.tokens(50)[None]
    more = torch.stack([tiny.tokens(7, seed=seed) for seed in range(3)])
    ids = torch.cat((prompt.expand(3, -1), more), 1)
    with attention_sinks(model, **SIZES), torch.no_grad():
        cache = model(prompt).past_key_values
        cache.batch_repeat_interleave(3)
        got = model.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY)
        assert torch.equal(got, model.generate(ids, max_new_tokens=5, **GREEDY))


def test_what_is_printed_says_strategy_tokens_and_bytes(tmp_path):
    model = tiny.ROTARY["llama"]()
    cache = SinkCache(model, **SIZES)
    assert repr(cache) == "SinkCache(attention_sinks, 0 tokens held of 0, 0 bytes)"
    model(tiny.tokens(1000)[None], past_key_values=cache)
    assert repr(cache) == "SinkCache(attention_sinks, 16 tokens held of 1,000, 8,192 bytes)"
    scored = carrying(tmp_path, strategy="h2o")
    with torch.no_grad():
        past = scored(**padded(tiny.tokens(5), tiny.tokens(9))).past_key_values
    assert repr(past) == "BatchedCache(h2o, 9 tokens held of 9, 7,168 bytes, 2 rows)"


@strategies
@pytest.mark.parametrize("n", [5, 16, 17, 40])
def test_a_layer_has_keys_and_values_of_what_is_held(asked, n, tmp_path):
    model = carrying(tmp_path, **asked)
    with torch.no_grad():
        past = model(tiny.tokens(n)[None]).past_key_values
        dense = model.model(tiny.tokens(n)[None], past_key_values=transformers.DynamicCache()).past_key_values
    assert len(list(past)) == len(past) == 2
    for keys, values in past:
        assert keys.shape == values.shape == (1, 2, min(n, 16), 16)
    if not asked:
        kept = torch.tensor([i for i in range(n) if i < 4 or i >= n - 12])
        assert torch.allclose(past[0][1], dense.layers[0].values[:, :, kept], atol=1e-5)
        assert torch.allclose(past[-1][0][:, :, :4], past[1][0][:, :, :4])
    with pytest.raises(IndexError):
        past[2]


def test_what_cannot_be_indexed_says_so():
    model = tiny.ROTARY["llama"]()
    with attention_sinks(model, **SIZES), torch.no_grad():
        with pytest.raises(UserError, match="seen nothing yet"):
            SinkCache(model)[0]
        past = model(**padded(tiny.tokens(5), tiny.tokens(9))).past_key_values
        with pytest.raises(UserError, match="held apart"):
            past[0]
    hybrid = tiny.STREAMABLE["qwen3_next"]()
    with attention_sinks(hybrid, **SIZES), torch.no_grad():
        past = hybrid(tiny.tokens(9)[None]).past_key_values
        assert past[1][0].shape[2] == 9
        with pytest.raises(UserError, match="carries a state"):
            past[0]
