"""How a model's keys turn is read once, of the model alone: no hook sees it, and a short forward costs no more."""

import gc
import time
import weakref
from statistics import median

import pytest
import tiny
import torch
from dropin import SIZES, every_family
from torch import nn

from sinkbench import SinkCache, attention_sinks
from sinkbench.cache.stream import StreamCache
from sinkbench.positions import detection
from sinkbench.positions.bare import bare
from sinkbench.positions.detection import read_positions


@every_family
def test_hooks_of_no_module_see_more_forwards_than_a_plain_model_has(family):
    model, seen = tiny.STREAMABLE[family](), []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: seen.append(m))
        module.register_forward_pre_hook(lambda m, *_: seen.append(m))
    with torch.no_grad():
        model(tiny.tokens(10)[None])
        plain, before = len(seen), {name: id(b) for name, b in model.named_buffers()}
        seen.clear()
        with attention_sinks(model, **SIZES):
            assert not seen
            assert {name: id(b) for name, b in model.named_buffers()} == before
            model(tiny.tokens(10)[None])
    assert len(seen) == plain


def test_positions_are_read_once_a_model_and_again_when_they_change(monkeypatch):
    times, real = [], detection._read
    monkeypatch.setattr(detection, "_read", lambda model: times.append(model.dtype) or real(model))
    model = tiny.ROTARY["llama"]()
    with attention_sinks(model, **SIZES), torch.no_grad():
        for n in (5, 60, 1):
            model(tiny.tokens(n)[None])
        model.generate(tiny.tokens(5)[None], max_new_tokens=3)
    SinkCache(model).reset()
    assert len(times) == 1
    SinkCache(model.double())
    assert times[1:] == [torch.float64]
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    faster = read_positions(model)[0]
    assert len(times) == 3
    assert not torch.equal(faster.inv_freq, real(tiny.ROTARY["llama"]())[0].inv_freq)


def test_what_was_read_does_not_keep_the_model():
    model = tiny.ROTARY["llama"]()
    StreamCache(model, tiny.plan(model, "attention_sinks"))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_bare_model_has_the_same_tensors_and_none_of_what_was_hung_on_it():
    model = tiny.ROTARY["llama"]()
    wanted = model(tiny.tokens(10)[None]).logits
    own = type(model).forward
    model.forward = lambda *args, **kwargs: pytest.fail("the wrapper ran")
    model.model.layers[0].forward = model.model.layers[0].forward  # bound to the layer: bound anew
    model.register_forward_hook(lambda *_: pytest.fail("the hook ran"))
    twin = bare(model)
    assert torch.equal(twin(tiny.tokens(10)[None]).logits, wanted)
    assert all(p is q for p, q in zip(model.parameters(), twin.parameters()))
    assert twin.model.layers[0].forward.__self__ is twin.model.layers[0]
    assert (twin.forward.__func__, isinstance(twin, nn.Module)) == (own, True)


@pytest.mark.heavy
@pytest.mark.parametrize("width", [64, 384])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "falcon"])
def test_a_forward_of_24_tokens_costs_what_the_plain_one_costs(family, width):
    model, ids = tiny.ROTARY[family](hidden_size=width, intermediate_size=4 * width), tiny.tokens(24)[None]
    with torch.no_grad(), attention_sinks(model):
        ratios = [_ratio({"plain": model.forward.__wrapped__, "ours": model.forward}, ids) for _ in range(5)]
    assert min(ratios) < 1.1, ratios


def _ratio(forwards, ids):
    """Of the medians of both, by turns: what else the machine does concerns both."""
    spent = {name: [] for name in forwards}
    for _ in range(100):
        for name, forward in forwards.items():
            begin = time.thread_time()
            forward(ids)
            spent[name].append(time.thread_time() - begin)
    return median(spent["ours"]) / median(spent["plain"])
