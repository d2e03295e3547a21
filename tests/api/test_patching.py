"""A model has the strategy as long as a ``with`` or a cache lasts, and nothing of it afterwards."""

import copy
import gc

import pytest
import tiny
import torch
import transformers
from dropin import GREEDY, METHODS, SIZES, benchmark, nlls
from golden import GOLDEN

import sinkbench
from sinkbench import SinkCache, attention_sinks
from sinkbench.errors import UserError


def test_nothing_stays_on_the_model():
    model = tiny.ROTARY["llama"]()
    before, plain = vars(model).copy(), nlls(model, tiny.tokens(50))
    kind = {name: getattr(type(model), name) for name in METHODS}
    with attention_sinks(model, **SIZES):
        assert set(vars(model)) - set(before) == set(METHODS)
        assert (nlls(model, tiny.tokens(50)) - plain).abs().max() > 0.1
    assert vars(model).copy() == before
    with pytest.raises(ZeroDivisionError), attention_sinks(model, **SIZES):
        model.generate(tiny.tokens(30)[None], max_new_tokens=2)
        raise ZeroDivisionError
    assert vars(model).copy() == before
    assert torch.equal(nlls(model, tiny.tokens(50)), plain)
    assert kind == {name: getattr(type(model), name) for name in METHODS}


def test_a_cache_object_gives_a_loaded_model_the_strategy_as_long_as_it_lives():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    before, plain, expected = vars(model).copy(), nlls(model, stream), benchmark(model, stream)
    cache = SinkCache(model, **SIZES)
    assert (nlls(model, stream, past_key_values=cache) - expected).abs().max() < 2e-4
    assert torch.equal(nlls(model, stream), plain)  # other calls are not touched
    assert cache.seen == 49
    cache.reset()
    assert (nlls(model, stream, past_key_values=cache) - expected).abs().max() < 2e-4
    del cache
    gc.collect()
    assert vars(model).copy() == before


def test_generate_takes_the_cache_object():
    model, prompt = tiny.ROTARY["gpt_neox"](), tiny.tokens(30)[None]
    made = model.generate(prompt, past_key_values=SinkCache(model, **SIZES), max_new_tokens=15, **GREEDY)
    with attention_sinks(model, **SIZES):
        assert torch.equal(model.generate(prompt, max_new_tokens=15, **GREEDY), made)


def test_contexts_nest_and_caches_outlive_them_only_to_say_so():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    before = vars(model).copy()
    with attention_sinks(model, attention_sink_size=0, attention_sink_window_size=16):
        windowed = nlls(model, stream)
        with attention_sinks(model, **SIZES):
            past = model(stream[None]).past_key_values
            assert (nlls(model, stream) - windowed).abs().max() > 0.1
        assert torch.equal(nlls(model, stream), windowed)
    assert vars(model).copy() == before
    with pytest.raises(UserError, match="within `with attention_sinks"):
        model(stream[None, :1], past_key_values=past)


def test_two_models_with_different_strategies_side_by_side():
    folder, stream = str(GOLDEN / "llama"), tiny.tokens(50)
    narrow = sinkbench.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SIZES)
    wide = sinkbench.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attention_sink_size=1, attention_sink_window_size=30
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):
        assert (nlls(narrow, stream) - benchmark(plain, stream)).abs().max() < 2e-4
        assert (nlls(wide, stream) - benchmark(plain, stream, 1, 30)).abs().max() < 2e-4
    assert not set(vars(plain)) & set(METHODS)


def test_the_benchmark_runs_on_a_model_that_carries_another_strategy(llama):
    stream = tiny.tokens(50)
    before = benchmark(tiny.STREAMABLE["llama"](), stream, 1, 20)
    assert torch.equal(benchmark(llama, stream, 1, 20), before)


def test_a_copied_or_saved_model_stands_on_its_own(tmp_path):
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    with attention_sinks(model, **SIZES):
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        expected = nlls(model, stream)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (nlls(twin, stream) - expected).abs().max() < 2e-4
    loaded = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **SIZES)
    assert (nlls(loaded, stream) - expected).abs().max() < 2e-4


def test_training_is_transformers_own_and_a_cache_in_use_carries_no_gradient(llama):
    stream = tiny.tokens(50)[None]
    assert not llama(stream).logits.requires_grad
    llama.train()
    outputs = llama(stream, labels=stream)
    llama.eval()
    assert outputs.loss.requires_grad
    with torch.inference_mode():
        past = llama(stream).past_key_values
    llama(stream[:, :1], past_key_values=past)


def test_without_a_cache_generate_is_transformers_own(llama):
    dense = llama.generate(tiny.tokens(30)[None], use_cache=False, max_new_tokens=3, **GREEDY)
    plain = tiny.STREAMABLE["llama"]()
    assert torch.equal(plain.generate(tiny.tokens(30)[None], max_new_tokens=3, **GREEDY), dense)
