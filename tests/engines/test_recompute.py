"""``recompute`` carries nothing: each prediction is that of a dense forward over the last tokens alone."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense, recomputed

from sinkbench.engines.choice import choose_engine
from sinkbench.engines.recompute import Recompute

WINDOW, TOLERANCE = 16, 2e-4

EVERY = {**tiny.STREAMABLE, **tiny.LEARNED}  # without a cache, positions that were learned are no obstacle
engines = pytest.mark.parametrize("engine", ["stepwise", "parallel"])


def read(engine, model, stream, window=WINDOW, start=0, chunk=None):
    plan = tiny.plan(model, "recompute", window)
    chosen = choose_engine(model, plan, engine, chunk=chunk)
    assert isinstance(chosen, Recompute)
    steps = list(chosen.run(plan, stream, start))
    assert {held for step in steps for held in step.kv_cache_bytes} <= {0}
    return torch.tensor([nll for step in steps for nll in step.nll], dtype=torch.float64)


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    assert not len(error) or error.max() <= TOLERANCE, f"off by {error.max():.2g} at step {error.argmax()}"


def assert_recomputes(engine, model):
    stream = tiny.tokens(44)
    assert_same(read(engine, model, stream), recomputed(model, stream, WINDOW))


def combinations():
    """Every family by the engine that batches windows, a few by both; the others are ``heavy``."""
    for family in EVERY:
        for engine in ("stepwise", "parallel"):
            light = family in tiny.FEW or engine == "parallel"
            yield pytest.param(family, engine, marks=() if light else pytest.mark.heavy)


@pytest.mark.parametrize(("family", "engine"), combinations())
def test_every_prediction_is_that_of_a_dense_forward_over_the_window(family, engine):
    assert_recomputes(engine, EVERY[family]())


@engines
@pytest.mark.parametrize(
    ("family", "setting"), [("gptj", "n_positions"), ("codegen", "n_positions"), ("mpt", "max_seq_len")]
)
def test_a_window_may_be_longer_than_a_table_of_positions(family, setting, engine):
    short, stream = tiny.STREAMABLE[family](**{setting: 10}), tiny.tokens(30)
    assert_same(read(engine, short, stream), recomputed(tiny.shared(family), stream, WINDOW))


@engines
def test_frequencies_follow_the_length_of_each_window(engine):
    assert_recomputes(engine, tiny.SCALED["dynamic"](max_position_embeddings=10))


@settings(max_examples=12)
@engines
@given(window=st.integers(1, 20), more=st.integers(1, 30), start=st.integers(0, 40), chunk=st.integers(1, 64))
def test_any_window_length_and_place_to_go_on_from(engine, window, more, start, chunk):
    model, stream = tiny.shared("llama"), tiny.tokens(window + 1 + more)
    start, chunks = min(start, len(stream) - 2), {"chunk": chunk} if engine == "parallel" else {}
    assert_same(read(engine, model, stream, window, start=start, **chunks), recomputed(model, stream, window)[start:])


@engines
def test_what_has_left_the_window_has_no_influence_and_in_a_cut_cache_it_has(engine):
    """The difference between ``recompute`` and ``windowed``: deeper layers of a cache remember."""
    model, stream = tiny.shared("llama"), tiny.tokens(40)
    other = torch.cat((tiny.tokens(8, seed=1), stream[8:]))
    assert_same(read(engine, model, stream)[24:], read(engine, model, other)[24:])
    plan = tiny.plan(model, "windowed", WINDOW)
    cut = [
        torch.tensor([nll for step in choose_engine(model, plan, engine).run(plan, s) for nll in step.nll])
        for s in (stream, other)
    ]
    assert (cut[0][24:] - cut[1][24:]).abs().max() > 0.01


@engines
@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1])
def test_within_the_window_it_is_dense_attention(length, engine):
    model, stream = tiny.shared("llama"), tiny.tokens(length)
    assert_same(read(engine, model, stream), dense(model, stream))
