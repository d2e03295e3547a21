"""``recompute`` carries nothing: each prediction is that of a dense forward over the last tokens alone."""

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import dense, recomputed

from sinkbench.engines.parallel import parallel
from sinkbench.engines.stepwise import stepwise
from sinkbench.strategies import resolve

WINDOW, TOLERANCE = 16, 2e-4

EVERY = {**tiny.STREAMABLE, **tiny.LEARNED}  # without a cache, positions that were learned are no obstacle
ENGINES = {"stepwise": stepwise, "parallel": parallel}
engines = pytest.mark.parametrize("engine", ENGINES)


def wrong(why):
    """Marks what the parallel engine gets wrong today; fails as soon as that is mended."""
    return pytest.mark.parametrize(
        "engine", ["stepwise", pytest.param("parallel", marks=pytest.mark.xfail(reason=why, strict=True))]
    )


def read(engine, model, stream, window=WINDOW, **more):
    steps = list(ENGINES[engine](model, resolve("recompute", window, 4), stream, **more))
    assert {held for step in steps for held in step.kv_cache_bytes} <= {0}
    return torch.tensor([nll for step in steps for nll in step.nll], dtype=torch.float64)


def assert_same(actual, expected):
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    assert not len(error) or error.max() <= TOLERANCE, f"off by {error.max():.2g} at step {error.argmax()}"


def assert_recomputes(engine, model):
    stream = tiny.tokens(44)
    assert_same(read(engine, model, stream), recomputed(model, stream, WINDOW))


@engines
@pytest.mark.parametrize("family", [family for family in EVERY if family != "opt"])
def test_every_prediction_is_that_of_a_dense_forward_over_the_window(family, engine):
    assert_recomputes(engine, EVERY[family]())


@wrong("the head of OPT reads its body's decoder, which is not replaced: its numbers are of other tokens")
def test_so_is_that_of_a_model_whose_head_reaches_into_its_body(engine):
    assert_recomputes(engine, tiny.LEARNED["opt"]())


@engines
@pytest.mark.parametrize(
    ("family", "setting"), [("gptj", "n_positions"), ("codegen", "n_positions"), ("mpt", "max_seq_len")]
)
def test_a_window_may_be_longer_than_a_table_of_positions(family, setting, engine):
    short, stream = tiny.STREAMABLE[family](**{setting: 10}), tiny.tokens(30)
    assert_same(read(engine, short, stream), recomputed(tiny.shared(family), stream, WINDOW))


@wrong("the first window is read at once, with the frequencies of its whole length")
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
    cut = [
        torch.tensor([nll for step in ENGINES[engine](model, resolve("windowed", WINDOW, 0), s) for nll in step.nll])
        for s in (stream, other)
    ]
    assert (cut[0][24:] - cut[1][24:]).abs().max() > 0.01


@wrong("a stream that ends within the window leaves a batch of no windows, which Llama cannot read")
@pytest.mark.parametrize("length", [1, 2, WINDOW, WINDOW + 1])
def test_within_the_window_it_is_dense_attention(length, engine):
    model, stream = tiny.shared("llama"), tiny.tokens(length)
    assert_same(read(engine, model, stream), dense(model, stream))
