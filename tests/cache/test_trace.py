"""When every token was evicted, against lists of what is alive that the tests keep themselves."""

from functools import cache

import eviction_oracle as brute
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbench.cache import trace as traces
from sinkbench.cache.trace import Trace, by_position
from sinkbench.engines.choice import choose_engine
from sinkbench.results.traces import ABSENT, HELD
from sinkbench.strategies import Policy
from sinkbench.strategies.formats import Format
from sinkbench.strategies.plan import LayerSizes, make_plan

WINDOW, LENGTH = 8, 40
RULES = {"h2o": brute.h2o, "tova": brute.tova, "knorm": brute.knorm, "keydiff": brute.keydiff}


@cache
def grouped():
    """Two heads of keys and values, each with two heads of queries, in float64: no choice hangs on rounding."""
    return tiny.build("llama", num_key_value_heads=2).double()


def traced(model, plan, stream, start=0, engine="stepwise"):
    """What was kept of all tokens that were fed."""
    trace = Trace(plan)
    for _ in choose_engine(model, plan, engine, chunk=7).run(plan, stream, start, trace):
        pass
    return trace.lifetimes("any", len(stream) - 1)


def alive(lifetime, step):
    """Which tokens are held after ``step``, for lifetimes ``(..., n)``."""
    born = np.arange(lifetime.shape[-1])
    return (born <= step) & ((lifetime == HELD) | (born + lifetime - 1 > step))


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize("sinks_recent", [(0, 0), (2, 3)])
@pytest.mark.parametrize("rule", RULES)
def test_of_a_score_every_head_has_the_lifetimes_that_its_evictions_give(rule, sinks_recent, engine):
    (sinks, recent), stream = sinks_recent, tiny.tokens(LENGTH)
    plan = tiny.plan(grouped(), rule, WINDOW, sinks, "text", recent=recent)
    kept = traced(grouped(), plan, stream, engine=engine)
    oracle = brute.scored(grouped(), stream, brute.Settings(RULES[rule], WINDOW, sinks, recent, "text"))
    wanted = np.zeros((2, 2, LENGTH - 1), int)
    for (layer, head), evictions in oracle.evictions.items():
        for step, token in evictions:
            wanted[layer, head, token] = step - token + 1
    assert np.array_equal(kept.lifetime, wanted)
    assert list(kept.layers) == [0, 1]
    assert list(kept.windows) == [WINDOW, WINDOW]


def lists(window, sinks, block, tokens):
    """Lifetimes by a list of what is held: when it is too long, the ``block`` oldest behind the sinks go."""
    held, found = [], [0] * tokens
    for step in range(tokens):
        held.append(step)
        if len(held) > window:
            for token in held[sinks : sinks + block]:
                found[token] = step - token + 1
            del held[sinks : sinks + block]
    return found


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("windowed", [(16, 0, 1)] * 2),
        ("attention_sinks", [(16, 4, 1)] * 2),
        ("context_shift", [(16, 4, (17 - 4) // 2)] * 2),
        ("pyramid", [(24, 4, 1), (8, 4, 1)]),  # 2 W - W / beta and W / beta with a beta of 2
    ],
)
def test_by_position_lifetimes_are_those_of_a_list(strategy, sizes, engine):
    more = {"beta": 2} if strategy == "pyramid" else {}
    plan = tiny.plan(grouped(), strategy, 16, 4, "text", **more)
    kept = traced(grouped(), plan, tiny.tokens(80), engine=engine)
    for layer, (window, sinks, block) in zip(kept.lifetime, sizes, strict=True):
        assert layer.tolist() == [lists(window, sinks, block, 79)] * 2
    assert list(kept.windows) == [window for window, _, _ in sizes]


def test_dense_attention_holds_everything_until_the_end():
    kept = traced(grouped(), tiny.plan(grouped(), "transformers"), tiny.tokens(30))
    assert kept.lifetime.shape == (2, 2, 29)
    assert (kept.lifetime == HELD).all()
    assert list(kept.windows) == [0, 0]


@given(window=st.integers(1, 20), data=st.data(), fed=st.integers(0, 90))
def test_by_position_as_many_are_alive_after_each_step_as_the_policy_holds(window, data, fed):
    sinks = data.draw(st.integers(0, window - 1))
    policy = Policy(window, sinks, block=data.draw(st.integers(1, window - sinks)))
    lifetime = by_position(policy, fed)
    assert [alive(lifetime, step).sum() for step in range(fed)] == [policy.held(step + 1) for step in range(fed)]
    assert (lifetime[:sinks] == HELD).all()


@settings(max_examples=15)
@given(rule=st.sampled_from(sorted(RULES)), positions=st.sampled_from(["text", "cache"]), data=st.data())
def test_of_a_score_each_head_holds_a_full_window_and_never_loses_what_is_protected(rule, positions, data):
    window = data.draw(st.integers(1, 9))
    sinks = data.draw(st.integers(0, window - 1))
    recent = data.draw(st.integers(0, window - 1 - sinks))
    plan = tiny.plan(grouped(), rule, window, sinks, positions, recent=recent)
    kept = traced(grouped(), plan, tiny.tokens(25)).lifetime
    for step in range(kept.shape[-1]):
        assert (alive(kept, step).sum(-1) == min(step + 1, window)).all()
    assert (kept[:, :, :sinks] == HELD).all()
    assert ((kept == HELD) | (kept > recent)).all()
    if rule == "tova":
        assert (kept == kept[:, :1]).all()


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("rule", ["h2o", "keydiff", "attention_sinks"])
def test_a_stream_taken_up_in_the_middle_has_the_trace_of_the_whole(rule, positions):
    plan, stream = tiny.plan(grouped(), rule, WINDOW, 1, positions), tiny.tokens(LENGTH)
    whole = traced(grouped(), plan, stream)
    for start in (WINDOW + 1, LENGTH - 1):
        assert np.array_equal(traced(grouped(), plan, stream, start).lifetime, whole.lifetime)


def test_a_trace_of_fewer_tokens_is_that_of_a_shorter_stream():
    plan, stream = tiny.plan(grouped(), "h2o", WINDOW, 0), tiny.tokens(LENGTH)
    trace = Trace(plan)
    for _ in choose_engine(grouped(), plan, "stepwise").run(plan, stream, 0, trace):
        pass
    wanted = traced(grouped(), plan, stream[:21])
    assert np.array_equal(trace.lifetimes("h2o", 20).lifetime, wanted.lifetime)


@pytest.mark.parametrize("notes", [1, 5, 4096])
def test_chunks_and_single_steps_say_the_same_in_whatever_batches(notes, monkeypatch):
    monkeypatch.setattr(traces, "NOTES", notes)
    plan = tiny.plan(grouped(), "h2o", WINDOW, 0)
    whole = traced(grouped(), plan, tiny.tokens(LENGTH)).lifetime
    chunked, mixed = Trace(plan), Trace(plan)
    for layer, lifetime in enumerate(whole):
        born = torch.arange(lifetime.shape[1]).expand(2, -1)
        steps = torch.from_numpy(np.where(lifetime == HELD, -5, born.numpy() + lifetime - 1)).long()
        for part in (slice(20), slice(20, 21), slice(21, None)):
            chunked.note_many(layer, born[:, part].flip(1), steps[:, part].flip(1))
        mixed.note_many(layer, born[:, 5:], steps[:, 5:])
        for step in range(lifetime.shape[1]):
            went = [(steps[head] == step).nonzero() for head in range(2)]
            if len(went[0]):
                mixed.note(layer, step, torch.cat(went)[:, 0])
    for trace in (chunked, mixed):
        assert np.array_equal(trace.lifetimes("h2o", whole.shape[-1]).lifetime, whole)


def test_layers_with_a_window_of_the_models_own_are_left_out():
    model = tiny.HYBRID["gemma3"]()
    kept = traced(model, tiny.plan(model, "h2o", WINDOW, 0), tiny.tokens(20))
    assert list(kept.layers) == [1]
    assert kept.lifetime.shape == (1, 2, 19)


def test_heads_that_a_layer_does_not_have_are_marked_as_absent():
    sizes = [LayerSizes("full", heads, 16) for heads in (1, 3)]
    plan = make_plan(sizes, lambda layer, layers: Policy(4, 1), "text", Format())
    kept = Trace(plan).lifetimes("attention_sinks", 9)
    wanted = lists(4, 1, 1, 9)
    assert kept.lifetime[0].tolist() == [wanted, [ABSENT] * 9, [ABSENT] * 9]
    assert kept.lifetime[1].tolist() == [wanted] * 3
    assert [heads.shape for heads in kept.heads()] == [(1, 9), (3, 9)]
