"""Every family of models streams as the oracle says (tests/oracle.py), step by step."""

from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launches import Asked
from oracle import dense, oracle
from tiny import shared
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.stream import StreamCache
from sinkbench.engines.forward import feeding, one_by_one
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError
from sinkbench.positions.detection import read_positions
from sinkbench.positions.reach import Reach
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies.registry import BUILTIN as STRATEGIES

WINDOW, SINKS, LENGTH = 16, 4, 44
TOLERANCE = 2e-4
CUT = {"windowed": 0, "attention_sinks": SINKS}

cut = pytest.mark.parametrize("strategy", CUT)
every_family = pytest.mark.parametrize("family", tiny.STREAMABLE)


def streamed(model: PreTrainedModel, strategy: str, stream: Tensor, window: int = WINDOW, sinks: int = SINKS) -> Tensor:
    steps = Stepwise(model).run(tiny.plan(model, strategy, window, sinks), stream)
    return torch.tensor([nll for step in steps for nll in step.nll], dtype=torch.float64)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs()
    assert not len(error) or error.max() <= TOLERANCE, f"off by {error.max():.2g} at step {error.argmax()}"


def assert_streams(model: PreTrainedModel, strategy: str, length: int = LENGTH) -> None:
    stream = tiny.tokens(length)
    assert_same(streamed(model, strategy, stream), oracle(model, stream, WINDOW, CUT[strategy]))


# Families


def cuts():
    """Every family with sinks, a few without too, which is the same code with fewer of them; the others ``heavy``."""
    for family in tiny.STREAMABLE:
        for strategy in CUT:
            light = strategy == "attention_sinks" or family in tiny.FEW
            yield pytest.param(family, strategy, marks=() if light else pytest.mark.heavy)


@pytest.mark.parametrize(("family", "strategy"), cuts())
def test_a_cut_cache_answers_as_if_rotated_anew_on_every_step(family: str, strategy: str) -> None:
    assert_streams(shared(family), strategy)


@every_family
def test_a_whole_cache_answers_as_transformers_does(family: str) -> None:
    stream = tiny.tokens(24)
    assert_same(streamed(shared(family), "transformers", stream), dense(shared(family), stream))


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "gemma3"])
def test_the_strategies_are_told_apart_once_the_window_is_full(family: str) -> None:
    stream = tiny.tokens(40)
    nlls = [streamed(shared(family), name, stream)[WINDOW + 1 :] for name in ("transformers", *CUT)]
    assert all((a - b).abs().mean() > 0.1 for a, b in [nlls[:2], nlls[1:], nlls[::2]])


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "dynamic"])
def test_the_strategies_agree_to_the_last_bit_until_the_window_is_full(family: str) -> None:
    stream = tiny.tokens(WINDOW + 2)  # the last step is t = WINDOW
    whole = streamed(shared(family), "transformers", stream)
    for strategy in CUT:
        assert torch.equal(streamed(shared(family), strategy, stream), whole)


# Configurations


@cut
@pytest.mark.parametrize(
    ("family", "limit"), [*(("dynamic", limit) for limit in (8, 16, 17, 30)), ("longrope", 8), ("longrope", 17)]
)
def test_frequencies_follow_the_length_of_the_cache_beyond_the_trained_one(
    family: str, limit: int, strategy: str
) -> None:
    if family == "dynamic":
        model = tiny.SCALED[family](max_position_embeddings=limit)
    else:
        scaling = {**shared(family).config.rope_parameters, "original_max_position_embeddings": limit}
        model = tiny.SCALED[family](rope_parameters=scaling)
    assert_streams(model, strategy)


@cut
def test_frequencies_are_read_from_a_model_that_has_seen_a_long_stream(strategy: str) -> None:
    model = tiny.SCALED["dynamic"](max_position_embeddings=8)
    dense(model, tiny.tokens(24))
    assert_streams(model, strategy, length=32)


@cut
@pytest.mark.parametrize("sliding", [16, 17, 24])
@pytest.mark.parametrize("family", ["gemma3"])
def test_sliding_layers_of_mixed_models_keep_their_own_window(family: str, sliding: int, strategy: str) -> None:
    assert_streams(tiny.HYBRID[family](sliding_window=sliding), strategy, length=34)


@cut
@pytest.mark.parametrize("limit", [10, 20])
@pytest.mark.parametrize("sliding", [8, 24])
def test_mixed_models_follow_frequencies_that_change_with_the_length(sliding: int, limit: int, strategy: str) -> None:
    layers: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    scaling = tiny.SCALED["dynamic"].keywords["rope_parameters"]  # type: ignore[attr-defined]
    mixed = tiny.ROTARY["qwen2"](
        rope_parameters=scaling, max_position_embeddings=limit, sliding_window=sliding, **layers
    )
    assert_streams(mixed, strategy, length=34)


@cut
def test_each_kind_of_layers_has_its_own_scaling_even_of_the_same_frequencies(strategy: str) -> None:
    scaling = {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    scaling["full_attention"] = tiny.SCALED["dynamic"].keywords["rope_parameters"]  # type: ignore[attr-defined]
    assert_streams(tiny.HYBRID["gemma3"](rope_parameters=scaling, max_position_embeddings=10), strategy, length=34)


@cut
@pytest.mark.parametrize("sliding", [17, 18, 4096])
def test_the_strategy_governs_models_of_wider_sliding_layers_only(sliding: int, strategy: str) -> None:
    assert_streams(tiny.ROTARY["mistral"](sliding_window=sliding), strategy, length=34)


@cut
@pytest.mark.parametrize("sliding", [8, 16])
def test_models_of_narrower_sliding_layers_only_are_left_as_they_are(sliding: int, strategy: str) -> None:
    model, stream = tiny.ROTARY["mistral"](sliding_window=sliding), tiny.tokens(34)
    assert_same(streamed(model, strategy, stream), dense(model, stream))


@cut
@pytest.mark.parametrize(
    ("family", "setting"), [("gptj", "n_positions"), ("codegen", "n_positions"), ("mpt", "max_seq_len")]
)
def test_a_window_may_be_longer_than_a_table_of_positions(family: str, setting: str, strategy: str) -> None:
    short, stream = tiny.STREAMABLE[family](**{setting: 10}), tiny.tokens(40)
    assert_same(streamed(short, strategy, stream), oracle(shared(family), stream, WINDOW, CUT[strategy]))
    assert_same(streamed(short, "transformers", stream), dense(shared(family), stream))


@cut
@pytest.mark.parametrize("family", ["bloom", "mpt", "falcon-alibi"])
def test_alibi_models_stream_with_a_number_of_heads_that_is_no_power_of_two(family: str, strategy: str) -> None:
    assert_streams(tiny.ALIBI[family](hidden_size=96, num_attention_heads=6), strategy, length=40)


@pytest.mark.parametrize("family", ["mpt", "bloom"])
def test_with_alibi_a_step_at_places_in_the_text_launches_about_what_one_in_the_cache_does(family: str) -> None:
    model, counts = shared(family), {}
    for positions in ("text", "cache"):
        steps = Stepwise(model).run(tiny.plan(model, "attention_sinks", 12, 2, positions), tiny.tokens(40))
        for _ in range(30):
            next(steps)
        with Asked() as asked:
            next(steps)
        counts[positions] = asked.counts.total()
        steps.close()
    assert counts["text"] <= 1.2 * counts["cache"]


# Sizes


@settings(max_examples=9)
@given(window=st.integers(2, 24), sinks=st.integers(0, 8), length=st.integers(1, 80), seed=st.integers(0, 9))
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_any_window_and_any_number_of_sinks(family: str, window: int, sinks: int, length: int, seed: int) -> None:
    sinks, stream = min(sinks, window - 1), tiny.tokens(length, seed)
    actual = streamed(shared(family), "attention_sinks", stream, window, sinks)
    assert_same(actual, oracle(shared(family), stream, window, sinks))


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_no_sinks_is_the_windowed_strategy(family: str) -> None:
    stream = tiny.tokens(40)
    assert torch.equal(
        streamed(shared(family), "attention_sinks", stream, sinks=0), streamed(shared(family), "windowed", stream)
    )


# Positions


@pytest.mark.parametrize("family", tiny.LEARNED)
def test_learned_positions_cannot_stream_and_the_error_says_so(family: str) -> None:
    model = tiny.LEARNED[family]()
    for strategy in CUT:
        with pytest.raises(UserError, match=rf"{type(model).__name__} learns absolute positions.*rotary.*ALiBi"):
            streamed(model, strategy, tiny.tokens(4))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_no_obstacle_to_dense_attention(family: str) -> None:
    model, stream = tiny.LEARNED[family](), tiny.tokens(40)
    assert_same(streamed(model, "transformers", stream), dense(model, stream))


def test_positions_are_read_from_a_model_that_embeds_some_tokens_as_zeros() -> None:
    model = tiny.ROTARY["llama"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[:16] = 0
    assert all(isinstance(rope, Rope) for rope in read_positions(model))


@pytest.mark.parametrize("family", ["cohere2", "smollm3"])
def test_layers_without_positions_are_told_from_those_with(family: str) -> None:
    assert [rope is None for rope in read_positions(shared(family))] == [False, True]


@pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neox", "glm", "yarn", "mpt", "gemma3"])
def test_rebasing_positions_often_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reach, "end", lambda self, n: WINDOW + 3)
    assert_streams(shared(family), "attention_sinks", length=60)


@cut
@pytest.mark.parametrize("family", ["llama", "gptj", "yarn"])
def test_positions_of_a_million_tokens_do_not_drift(family: str, strategy: str) -> None:
    model, stream, begin = shared(family), tiny.tokens(LENGTH), 30
    stream_cache = StreamCache(model, tiny.plan(model, strategy, WINDOW, SINKS))
    feed = feeding(model, stream_cache)
    nlls = []
    with torch.inference_mode():
        for t in range(len(stream) - 1):
            if t == begin:  # as if the stream had begun a million tokens earlier
                for layer in stream_cache.kept:
                    layer.shift(10**6)
                stream_cache.position += 10**6
            logits = feed(stream[t : t + 1]).logits[0, -1]
            nlls.append(-float(logits.double().log_softmax(-1)[stream[t + 1]]))
    assert_same(torch.tensor(nlls, dtype=torch.float64), oracle(model, stream, WINDOW, CUT[strategy]))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_a_turn_by_a_million_positions_is_exact(family: str) -> None:
    rope = read_positions(shared(family))[0]
    assert rope is not None
    cos, sin = rope.turn(torch.tensor([10**6]))
    angles = [10**6 * frequency for frequency in rope.inv_freq.tolist()]
    assert torch.allclose(cos[0].double(), torch.tensor(angles, dtype=torch.float64).cos(), atol=1e-6)
    assert torch.allclose(sin[0].double(), torch.tensor(angles, dtype=torch.float64).sin(), atol=1e-6)


def test_thousands_of_tokens_with_many_rebases_end_as_the_oracle_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, window, sinks, tail = tiny.ROTARY["llama"](num_hidden_layers=1), 8, 4, 50
    stream, fed, rebases = tiny.tokens(2600), [], []
    advance, rebase = StreamCache.advance, StreamCache._rebase
    monkeypatch.setattr(StreamCache, "advance", lambda self, n: (fed.append(self.position), advance(self, n))[1])
    monkeypatch.setattr(StreamCache, "_rebase", lambda self: (rebases.append(self.position), rebase(self))[1])
    actual = streamed(model, "attention_sinks", stream, window, sinks)
    assert len(rebases) >= 3
    assert max(fed) < 1024
    # One layer's keys depend on their own token only: whatever was dropped has left no trace.
    spliced = torch.cat((stream[:sinks], stream[-tail - 1 - (window - sinks) :]))
    assert_same(actual[-tail:], oracle(model, spliced, window, sinks)[-tail:])


# Cost


@pytest.mark.parametrize("window", [16, 128])
def test_a_step_turns_the_sinks_and_nothing_else(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream, turned = shared("llama"), tiny.tokens(window + 120), []
    stream_cache = StreamCache(model, tiny.plan(model, "attention_sinks", window, SINKS))
    feed = feeding(model, stream_cache)
    call = Rotation.__call__
    monkeypatch.setattr(Rotation, "__call__", lambda self, x: (turned.append(x.shape[-2]), call(self, x))[1])
    with torch.inference_mode():
        for token in stream:
            turned.clear()
            feed(token[None])
            assert sum(turned) <= SINKS * model.config.num_hidden_layers
    assert sum(turned) == SINKS * model.config.num_hidden_layers


@cut
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3"])
def test_memory_is_constant_once_the_window_is_full(family: str, strategy: str) -> None:
    model, config = shared(family), shared(family).config
    stream_cache = StreamCache(model, tiny.plan(model, strategy, WINDOW, SINKS))
    feed = feeding(model, stream_cache)
    sizes = set()
    with torch.inference_mode():
        for t, token in enumerate(tiny.tokens(90)):
            feed(token[None])
            strips = tuple((layer.keys.shape, layer.values.shape) for layer in stream_cache.kept)
            sizes |= {(stream_cache.nbytes, strips)} if t >= WINDOW else set()
    ((held, _),) = sizes
    if family != "gemma3":
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        assert held == 2 * 4 * WINDOW * heads * 16 * config.num_hidden_layers


@pytest.mark.parametrize("strategy", ["transformers", "attention_sinks", "h2o"])
def test_of_a_group_of_falcon_which_copies_its_keys_for_each_query_one_is_kept(strategy: str) -> None:
    model, stream = shared("falcon-grouped"), tiny.tokens(40)
    plan = tiny.plan(model, strategy, WINDOW, SINKS)
    begun = prefilled(model, plan, stream[:25])
    with torch.inference_mode(), one_by_one(model, begun, 40) as feed:
        for token in stream[25:]:
            feed(token[None])
    held = 40 if strategy == "transformers" else WINDOW
    assert {layer.keys.shape[1] for layer in begun.kept} == {2}
    assert begun.nbytes == 2 * 4 * held * 2 * 16 * 2  # keys and values, float32, entries, heads, features, layers


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stream_of_one_token_has_nothing_to_predict(strategy: str) -> None:
    assert len(streamed(shared("llama"), strategy, tiny.tokens(1), window=128)) == 0
