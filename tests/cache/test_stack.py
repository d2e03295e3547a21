"""Layers that are alike are chosen for together: the same goes as layer by layer, and a step asks for little more."""

import copy
import gc
import pickle
from functools import cache
from weakref import ref

import pytest
import tiny
import torch
from evictions import RULES, run
from launches import Asked

from sinkbench.cache import stack as stacks
from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stack import Stack
from sinkbench.cache.stream import StreamCache
from sinkbench.engines.forward import feeding, reading
from sinkbench.models.sizes import layer_sizes
from sinkbench.positions.detection import read_positions
from sinkbench.positions.exact import exact_angles
from sinkbench.strategies import choose, find

WINDOW, LENGTH, LAYERS = 8, 30, 4
each_rule = pytest.mark.parametrize("rule", RULES)
each_position = pytest.mark.parametrize("positions", ["text", "cache"])


@cache
def deep(layers=LAYERS):
    return tiny.build("llama", num_hidden_layers=layers, num_key_value_heads=2).double()


def plan_of(rule, positions, model):
    name, parameters, _ = RULES[rule]
    return tiny.plan(model, name, WINDOW, 1, positions, recent=2, **parameters)


def cache_after(model, plan, tokens):
    cache = StreamCache(model, plan)
    with torch.inference_mode(), exact_angles(model), reading(model, cache):
        feed = feeding(model, cache)
        for token in tokens:
            feed(token[None])
    return cache


@each_position
@each_rule
def test_asked_once_for_all_layers_a_built_in_rule_evicts_what_it_does_asked_for_each(rule, positions):
    name, parameters, _ = RULES[rule]
    kind = find(name).kind
    apart = type("Apart", (kind,), {"__doc__": "As built in.", "__module__": __name__, "together": False})
    wanted, evictions = run(deep(), plan_of(rule, positions, deep()), tiny.tokens(LENGTH))
    chosen = choose(apart(**parameters, recent=2, sinks=1), WINDOW, positions=positions)
    nll, found = run(deep(), chosen.plan(layer_sizes(deep().config)), tiny.tokens(LENGTH))
    assert found == evictions
    assert (nll - wanted).abs().max() <= 1e-9


@each_position
@each_rule
@pytest.mark.parametrize("most", [1, 3])
def test_layers_that_are_too_large_together_choose_in_parts_and_evict_the_same(most, rule, positions, monkeypatch):
    plan = plan_of(rule, positions, deep())
    wanted, evictions = run(deep(), plan, tiny.tokens(LENGTH))
    monkeypatch.setattr(stacks, "BYTES", most * 2 * (WINDOW + 1) * 16 * 8)  # two heads of 16 features, in float64
    nll, found = run(deep(), plan, tiny.tokens(LENGTH))
    assert [layer.row for layer in cache_after(deep(), plan, tiny.tokens(1)).kept] == [i % most for i in range(LAYERS)]
    assert found == evictions
    assert torch.equal(nll, wanted)


@each_position
@each_rule
def test_what_a_cache_holds_is_free_once_it_is_gone_and_does_not_wait_for_the_garbage_collector(rule, positions):
    """Else a GPU's memory fills up with caches of earlier runs, and later ones are cut into other batches."""
    cache = cache_after(deep(), plan_of(rule, positions, deep()), tiny.tokens(LENGTH))
    held = [ref(layer.stack.keys) for layer in cache.kept]
    gc.collect()
    gc.disable()
    try:
        del cache
        assert [one() for one in held] == [None] * LAYERS
    finally:
        gc.enable()


@each_position
def test_a_copy_of_a_cache_has_layers_of_its_own(positions):
    tokens = tiny.tokens(LENGTH)
    cache = cache_after(deep(), plan_of("h2o", positions, deep()), tokens[:-1])
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert copied.kept[0].stack.layers == copied.kept
        assert copied.kept[0].stack is not cache.kept[0].stack
        assert copied.kept[0].stack.depth == LAYERS
        assert torch.equal(copied.kept[-1].entries()[0], cache.kept[-1].entries()[0])


@each_position
def test_a_layer_that_lies_elsewhere_parts_from_those_before_it_in_the_middle_of_a_step(positions):
    """As where a model is spread over devices; what is another device there is another type here."""
    plan, rope = plan_of("h2o", positions, deep()), read_positions(deep())[0]
    generator = torch.Generator().manual_seed(0)
    types = [torch.float32, torch.float32, torch.float64, torch.float64]

    def layers():
        return [ScoredLayer(layer, rope, number) for number, layer in enumerate(plan.governed)]

    together, alone = layers(), layers()
    Stack(plan.governed[0], together)
    for _ in range(LENGTH):
        for one, other, dtype in zip(together, alone, types, strict=True):
            key, value, weights = (torch.randn(1, 2, 1, 16, generator=generator).to(dtype) for _ in range(3))
            ours, theirs = one.update(key, value), other.update(key, value)
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
            weights = torch.randn(1, 2, 2, ours[0].shape[2], generator=generator).to(dtype).softmax(-1)
            one.evict(weights)
            other.evict(weights)
    assert [layer.row for layer in together] == [0, 1, 0, 1]
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(together, alone, strict=True))


@cache
def asked(name, positions=None):
    """What a step asks for, past a full window, of a model of many layers."""
    model = deep(32)
    cache = StreamCache(model, tiny.plan(model, name, WINDOW, None, positions))
    stream = tiny.tokens(WINDOW + 3)
    with torch.no_grad(), exact_angles(model), reading(model, cache):
        feed = feeding(model, cache)
        for token in stream[:-1]:
            feed(token[None])
        with Asked() as found:
            feed(stream[-1:])
    return found.counts


@each_position
@pytest.mark.parametrize("name", ["h2o", "tova", "knorm", "keydiff", "random"])
def test_a_step_asks_hardly_more_of_a_device_than_under_attention_sinks_and_never_waits_for_it(name, positions):
    counts = asked(name, positions)
    assert counts.total() <= 1.15 * asked("attention_sinks").total()
    assert not counts.keys() & {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero"}
