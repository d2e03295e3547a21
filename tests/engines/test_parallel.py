"""The parallel engine gives the stepwise engine's NLLs: every family, any chunk, window and number of sinks."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import shared
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench.attention.redirection import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.engines import head
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.chunks import chunk_for
from sinkbench.engines.chunks import read as read_chunk
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError

LARGEST, MEAN = 1e-3, 1e-5


STRATEGIES = {
    "attention_sinks": {},
    "windowed": {},
    "transformers": {},
    "context_shift": {},
    "pyramid": {"beta": 2},
}


def nll(engine, plan, tokens, start=0):
    return np.array([value for steps in engine.run(plan, tokens, start) for value in steps.nll])


def assert_agree(model, plan, tokens, chunk):
    difference = np.abs(nll(Parallel(model, chunk), plan, tokens) - nll(Stepwise(model), plan, tokens))
    assert len(difference) == len(tokens) - 1
    assert difference.max() <= LARGEST
    assert difference.mean() <= MEAN


STATEFUL = {"qwen3_next"}  # linear-attention layers carry a state from token to token


def combinations():
    """Every family with two strategies, a few with all of them; the others are ``heavy``."""
    for family in [family for family in tiny.STREAMABLE if family not in STATEFUL]:
        for strategy in STRATEGIES:
            light = family in tiny.FEW or strategy in ("attention_sinks", "pyramid")
            yield pytest.param(family, strategy, marks=() if light else pytest.mark.heavy)


@pytest.mark.parametrize(("family", "strategy"), combinations())
def test_every_family_agrees_with_token_by_token(family, strategy):
    model = shared(family)
    assert_agree(model, tiny.plan(model, strategy, 16, 4, **STRATEGIES[strategy]), tiny.tokens(50), chunk=21)


@settings(max_examples=25)
@given(
    family=st.sampled_from(["llama", "bloom", "gptj"]),
    window=st.integers(1, 24),
    sinks=st.integers(0, 8),
    chunk=st.integers(1, 70),
    length=st.integers(2, 60),
)
def test_any_window_sinks_chunk_and_length_agree(family, window, sinks, chunk, length):
    model = shared(family)
    assert_agree(model, tiny.plan(model, "attention_sinks", sinks + window, sinks), tiny.tokens(length), chunk)


@pytest.mark.parametrize("family", sorted(STATEFUL & set(tiny.STREAMABLE)))
def test_a_model_that_carries_a_state_is_refused_and_the_other_engine_named(family):
    model = shared(family)
    plan = tiny.plan(model, "windowed")
    assert "--engine stepwise" in Parallel(model).refuses(plan)
    with pytest.raises(UserError, match="--engine stepwise"):
        choose_engine(model, plan, "parallel")


def test_memory_does_not_grow_with_the_stream():
    model = shared("llama")
    plan = tiny.plan(model, "attention_sinks")
    held = [held for steps in Parallel(model, 32).run(plan, tiny.tokens(600)) for held in steps.kv_cache_bytes]
    assert held == [held for steps in Stepwise(model).run(plan, tiny.tokens(600)) for held in steps.kv_cache_bytes]
    assert len(set(held[16:])) == 1
    cache_ = StreamCache(model, plan)
    sizes = set()
    with torch.inference_mode(), attending(model, cache_):
        for part in tiny.tokens(640).split(32):
            read_chunk(model, cache_, part[None])
            sizes.add(sum(layer.keys.numel() + layer.values.numel() for layer in cache_.kept))
    assert len(sizes) == 1


def test_logits_are_never_held_for_the_whole_chunk(monkeypatch):
    model = shared("llama")
    plan = tiny.plan(model, "windowed")
    whole = nll(Parallel(model, 64), plan, tiny.tokens(100))
    monkeypatch.setattr(head, "SLICE_BYTES", 5 * 4 * tiny.VOCABULARY)
    rows = []
    original = head.loss
    monkeypatch.setattr(head, "loss", lambda x, *a, **k: rows.append(len(x)) or original(x, *a, **k))
    sliced = nll(Parallel(model, 64), plan, tiny.tokens(100))
    assert (max(rows), sum(rows)) == (5, 99)
    assert sliced == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("vocabulary", [32_000, 50_432, 65_024, 128_256, 256_000])
def test_on_a_gpu_a_slice_of_logits_is_made_of_whole_tiles(vocabulary):
    """Rows beside them would be formed for nothing; fewer, and the head would be read for them alone."""
    rows = head._rows(vocabulary, on_gpu=True)
    assert rows % head.TILE == 0
    assert 2**27 < 4 * rows * vocabulary <= 2**28


def test_a_slice_of_logits_takes_no_more_than_128_mib_whatever_the_vocabulary(monkeypatch):
    model = tiny.ROTARY["llama"](vocab_size=50_000, hidden_size=8, num_hidden_layers=1)
    sizes = []
    original = head.loss
    monkeypatch.setattr(head, "loss", lambda x, *a, **k: sizes.append(x.nbytes) or original(x, *a, **k))
    stream = tiny.tokens(1200)
    nll(Parallel(model, 1024), tiny.plan(model, "windowed"), stream)
    assert len(sizes) > 2  # the first chunk alone would be 195 MiB
    assert max(sizes) <= 128 * 2**20


def test_nothing_stays_replaced_afterwards():
    for family in ("llama", "falcon", "gptj", "mpt"):
        model = shared(family)
        before = (model.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS))
        nll(Parallel(model), tiny.plan(model, "attention_sinks"), tiny.tokens(30))
        assert (model.config._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS)) == before
        assert not any("forward" in vars(m) or "_attn" in vars(m) for m in model.modules())


def test_a_bfloat16_stream_keeps_its_perplexity_within_half_a_percent():
    model = tiny.STREAMABLE["llama"](initializer_range=0.05).to(torch.bfloat16)
    plan, tokens = tiny.plan(model, "attention_sinks", 32), tiny.tokens(400)
    one, many = nll(Stepwise(model), plan, tokens).mean(), nll(Parallel(model, 64), plan, tokens).mean()
    assert np.exp(many) == pytest.approx(np.exp(one), rel=5e-3)


def test_the_chunk_fits_the_free_memory(monkeypatch):
    model = shared("llama")
    assert chunk_for(model) == 2048

    class Little:
        available = 4 * 2**20

    monkeypatch.setattr("psutil.virtual_memory", Little)
    assert chunk_for(model) < 2048


@pytest.mark.cuda
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "mean"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_a_stream_on_cuda_gives_the_nlls_of_the_cpu(strategy, dtype, mean):
    model, tokens = tiny.STREAMABLE["llama"](initializer_range=0.05), tiny.tokens(400)
    plan = tiny.plan(model, strategy, 64, 4, **STRATEGIES[strategy])
    wanted = nll(Stepwise(model), plan, tokens)
    got = nll(Parallel(model.to("cuda", getattr(torch, dtype)), 150), plan, tokens)
    assert np.abs(got - wanted).mean() <= mean
    assert got.mean() == pytest.approx(wanted.mean(), abs=mean / 10)
