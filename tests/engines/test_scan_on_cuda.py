"""Scans on CUDA: what the processor chooses in float64; in float32 what single steps choose."""

import pytest
import tiny
from evictions import RULES, read

from sinkbench.attention import patterns
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise

pytestmark = pytest.mark.cuda

FAMILIES = ("llama", "falcon", "gemma", "gemma2", "mpt", "falcon-alibi", "gptj", "cohere2")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float64_the_device_chooses_what_the_processor_chooses(family, rule, monkeypatch):
    """Norms of many families are computed in float32 and differ in the last bits, so NLLs are the device's own."""
    name, parameters, _ = RULES[rule]
    here, there = tiny.STREAMABLE[family]().double(), tiny.STREAMABLE[family]().double().cuda()
    plan = tiny.plan(here, name, 24, 2, recent=3, **parameters)
    _, evictions = read(Parallel(here, 37), plan, tiny.tokens(90))
    nll, same = read(Parallel(there, 37), plan, tiny.tokens(90))
    assert same == evictions
    monkeypatch.setattr(patterns, "scans_for", lambda kind: None)
    assert (nll - read(Parallel(there, 37), plan, tiny.tokens(90))[0]).abs().max() <= 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_in_float32_chunks_say_what_single_steps_say(rule):
    name, parameters, _ = RULES[rule]
    model = tiny.build("llama", num_key_value_heads=2, head_dim=32).cuda()
    plan = tiny.plan(model, name, 24, 1, recent=3, **parameters)
    wanted, evictions = read(Stepwise(model), plan, tiny.tokens(120))
    nll, same = read(Parallel(model, 37), plan, tiny.tokens(120))
    assert same == evictions
    assert (nll - wanted).abs().max() <= 1e-3


@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0", "fp8_e4m3"])
@pytest.mark.parametrize("rule", RULES)
def test_in_few_bits_chunks_say_what_single_steps_say(rule, kv_format):
    """In float64: in float32 a key between two steps of a format falls either way, and nothing bounds what follows."""
    name, parameters, _ = RULES[rule]
    model = tiny.build("llama", num_key_value_heads=2, head_dim=32).double().cuda()
    plan = tiny.plan(model, name, 24, 1, recent=3, kv_format=kv_format, **parameters)
    wanted, evictions = read(Stepwise(model), plan, tiny.tokens(120))
    nll, same = read(Parallel(model, 37), plan, tiny.tokens(120))
    assert same == evictions
    assert (nll - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("rule", ["h2o", "tova"])
@pytest.mark.parametrize("window", [5, 1000, 1024])
def test_windows_and_groups_of_any_size(window, rule, heads):
    model = tiny.build("llama", num_attention_heads=8, num_key_value_heads=heads, num_hidden_layers=1)
    plan = tiny.plan(model, rule, window, 2, recent=2)
    stream = tiny.tokens(window + 300)
    _, evictions = read(Parallel(model.double(), 256), plan, stream)
    assert read(Parallel(model.cuda(), 200), plan, stream)[1] == evictions
