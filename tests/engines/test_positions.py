"""Strategies that go by position, at both kinds of positions: every family and engine against the oracle."""

from functools import cache

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import by_position
from tiny import shared

from sinkbench.engines.choice import choose_engine
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.positions.detection import read_positions

WINDOW, SINKS, LENGTH, TOLERANCE = 16, 4, 44, 2e-4
STATEFUL = {"qwen3_next"}  # token by token only
# One mask for all layers does not do for the oracle where they hold different numbers of entries; these models build
# one, or a term for each entry, whatever the attention.
UNEVEN_IS_BEYOND_THE_ORACLE = {
    "gemma2",
    "gpt_oss",
    "bloom",
    "mpt",
    "falcon-alibi",
    "falcon",
    "falcon-grouped",
    "gptj",
    "gptj-whole-head",
    "codegen",
}


def windowed(window, sinks=0):
    return lambda layer, layers, fed: list(range(max(0, fed - window), fed))


def attention_sinks(window, sinks):
    def held(layer, layers, fed):
        return list(range(fed)) if fed <= window else [*range(sinks), *range(fed - (window - sinks), fed)]

    return held


def context_shift(window, sinks):
    """llama.cpp's: token by token, as it happens."""

    @cache
    def held(layer, layers, fed):
        kept = [*held(layer, layers, fed - 1), fed - 1] if fed else []
        if len(kept) > window:
            kept = kept[:sinks] + kept[sinks + (window + 1 - sinks) // 2 :]
        return kept

    return lambda layer, layers, fed: list(held(0, 0, fed))


def pyramid(window, sinks):
    """Two layers: 2 W - W / 2 entries and W / 2."""

    def held(layer, layers, fed):
        budget = window if layers == 1 else {0: 2 * window - window // 2, 1: window // 2}[layer]
        return attention_sinks(budget, sinks)(layer, layers, fed)

    return held


RULES = {"windowed": windowed, "attention_sinks": attention_sinks, "context_shift": context_shift, "pyramid": pyramid}
PARAMETERS = {"pyramid": {"beta": 2}}
EACH = [(s, p) for s in RULES for p in ("cache", "text")]
each = pytest.mark.parametrize(("strategy", "positions"), EACH)


def with_each(families):
    """Every family with two of them, a few with all of them; the others are ``heavy``."""
    always = {("attention_sinks", "cache"), ("context_shift", "text")}
    return pytest.mark.parametrize(
        ("family", "strategy", "positions"),
        [
            pytest.param(name, *one, marks=() if name in tiny.FEW or one in always else pytest.mark.heavy)
            for name in families
            for one in EACH
        ],
    )


def plan_of(model, strategy, positions, window=WINDOW, sinks=SINKS):
    return tiny.plan(model, strategy, window, sinks, positions, **PARAMETERS.get(strategy, {}))


def nll(engine, plan, stream, start=0):
    return torch.tensor(
        [value for steps in engine.run(plan, stream, start) for value in steps.nll], dtype=torch.float64
    )


def assert_same(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    assert not len(error) or error.max() <= tolerance, f"off by {error.max():.2g} at step {error.argmax()}"


@with_each(tiny.STREAMABLE)
def test_every_engine_holds_what_the_rule_says_where_it_says(family, strategy, positions):
    if strategy == "pyramid" and family in UNEVEN_IS_BEYOND_THE_ORACLE:
        pytest.skip(f"the oracle cannot give the layers of {family} caches of different lengths")
    model, stream = shared(family), tiny.tokens(LENGTH)
    plan = plan_of(model, strategy, positions)
    wanted = by_position(model, stream, RULES[strategy](WINDOW, SINKS), positions)
    assert_same(nll(Stepwise(model), plan, stream), wanted)
    if family in tiny.FEW:
        assert_same(nll(Stepwise(model), plan, stream, 29), wanted[29:])
    changing = positions == "text" and family in ("dynamic", "longrope")
    if family not in STATEFUL and not changing:
        assert_same(nll(Parallel(model, 21), plan, stream), wanted)


@with_each(sorted(UNEVEN_IS_BEYOND_THE_ORACLE))
def test_engines_agree_where_the_oracle_does_not_reach(family, strategy, positions):
    model, stream = shared(family), tiny.tokens(LENGTH)
    plan = plan_of(model, strategy, positions)
    assert_same(nll(Parallel(model, 21), plan, stream), nll(Stepwise(model), plan, stream))


@settings(max_examples=20)
@given(
    strategy=st.sampled_from(["attention_sinks", "context_shift"]),
    positions=st.sampled_from(["cache", "text"]),
    family=st.sampled_from(["llama", "gptj", "mpt"]),
    window=st.integers(2, 24),
    sinks=st.integers(0, 8),
    length=st.integers(2, 70),
    chunk=st.integers(1, 40),
)
def test_any_window_sinks_length_and_chunk(strategy, positions, family, window, sinks, length, chunk):
    sinks, model, stream = min(sinks, window - 1), shared(family), tiny.tokens(length)
    plan = plan_of(model, strategy, positions, window, sinks)
    wanted = by_position(model, stream, RULES[strategy](window, sinks), positions)
    assert_same(nll(Stepwise(model), plan, stream), wanted)
    assert_same(nll(Parallel(model, chunk), plan, stream), wanted)


@each
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_in_float64_engines_agree_to_the_last_bits(family, strategy, positions):
    model, stream = tiny.STREAMABLE[family]().double(), tiny.tokens(LENGTH)
    plan = plan_of(model, strategy, positions)
    assert_same(nll(Parallel(model, 17), plan, stream), nll(Stepwise(model), plan, stream), 1e-9)


def test_positions_make_a_difference_once_tokens_behind_the_sinks_are_gone():
    model, stream = shared("llama"), tiny.tokens(60)
    both = [nll(Stepwise(model), plan_of(model, "attention_sinks", p), stream) for p in ("cache", "text")]
    assert torch.equal(both[0][: WINDOW + 1], both[1][: WINDOW + 1])
    assert (both[0] - both[1])[WINDOW + 1 :].abs().mean() > 0.01


def test_text_positions_of_a_window_alone_are_those_of_the_cache():
    model, stream = shared("llama"), tiny.tokens(60)
    assert_same(*(nll(Stepwise(model), plan_of(model, "windowed", p), stream) for p in ("cache", "text")))


def test_the_layers_of_a_pyramid_hold_their_budgets():
    model = shared("llama")
    engine = choose_engine(model, plan := plan_of(model, "pyramid", "text"), "stepwise")
    held = [steps.kv_cache_bytes[0] for steps in engine.run(plan, tiny.tokens(60))]
    a_token = 2 * 2 * 16 * 4  # a key and a value, heads, width, float32
    assert held == [a_token * (min(n, 24) + min(n, 8)) for n in range(1, 60)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_are_read_off_a_model_whose_rounding_may_send_a_token_to_other_experts(dtype):
    """Deep, with experts that are nearly equal: what differs by rounding in one layer is another token in the last."""
    sizes = {"num_hidden_layers": 24, "num_local_experts": 32, "num_experts_per_tok": 4, "num_key_value_heads": 2}
    model = tiny.build("gpt_oss", attn="eager", head_dim=16, **sizes)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    found = read_positions(model)
    assert len(found) == 24 and all(torch.equal(rope.inv_freq, found[0].inv_freq) for rope in found)
