"""What a token costs: the loop that is timed is the seed's, and the table says what was measured."""

import json

import pytest
import tiny
import torch
from golden import GOLDEN

from sinkbench.diagnostics import speed
from sinkbench.engines.stepwise import Stepwise

WINDOW, SINKS = 24, 4


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "gemma"])
def test_the_seeds_loop_computes_what_the_stepwise_engine_does(name):
    model, tokens = tiny.ROTARY[name](), tiny.tokens(80)
    plan = tiny.plan(model, "attention_sinks", WINDOW, SINKS)
    wanted = torch.tensor([s.nll[0] for s in Stepwise(model).run(plan, tokens)])
    before = model.config._attn_implementation
    seed = torch.tensor([step.nll[0] for step in speed.seed_loop(model, WINDOW, SINKS, tokens)])
    assert seed == pytest.approx(wanted, abs=2e-4)
    assert model.config._attn_implementation == before


def test_every_timing_is_of_steps_past_a_full_window():
    plan = speed.Timings(window=16, sinks=4, steps=5, streams=[30, 40], dense=20)
    model = tiny.ROTARY["llama"]()
    costs = {cost.what: cost for cost in speed.measure(model, plan)}
    assert [len(costs[f"stepwise, {name}"].timings) for name in ("windowed", "attention_sinks")] == [5, 5]
    assert len(costs["stepwise, transformers, 20 tokens held"].timings) == 5
    assert len(costs["the seed's loop"].timings) == 5
    assert {name for name in costs if "parallel" in name} == {
        f"parallel, {name}, {n} tokens" for name in ("windowed", "attention_sinks") for n in (30, 40)
    }
    assert all(timing > 0 for cost in costs.values() for timing in cost.timings)


def test_what_the_parallel_engine_refuses_is_timed_step_by_step_alone():
    timings = speed.Timings(window=16, sinks=None, steps=3, streams=[30], dense=0, strategies=["recompute", "h2o"])
    lines = []
    costs = [cost.what for cost in speed.measure(tiny.ROTARY["llama"](), timings, lines.append)]
    assert [what for what in costs if what[0] in "sp"] == [
        "stepwise, recompute",
        "stepwise, h2o",
        "parallel, h2o, 30 tokens",
    ]
    assert "parallel, recompute: no cache is carried: each token is read afresh" in lines


def test_streams_are_timed_side_by_side_a_token_of_each_counting():
    timings = speed.Timings(16, None, steps=0, streams=[30], dense=0, strategies=["h2o"], side_by_side=[1, 3])
    costs = {cost.what: cost for cost in speed.measure(tiny.ROTARY["llama"](), timings) if cost.each == "stream"}
    assert list(costs) == ["parallel, h2o, 30 tokens", "parallel, h2o, 3 x 30 tokens"]
    assert all(cost.ms > 0 for cost in costs.values())


def test_the_floor_counts_every_weight_that_a_token_meets_and_its_cache():
    model = tiny.ROTARY["llama"](tie_word_embeddings=False)
    met = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    cache = 2 * 2 * 2 * 16  # keys and values, layers, heads, width
    assert speed.bytes_a_token(model, 10) == 4 * (met + 10 * cache)


def test_a_spread_is_that_of_the_timings():
    cost = speed.Cost("steps", [float(i) for i in range(1, 102)])
    assert (cost.ms, cost.p99) == (51.0, pytest.approx(100.98))
    assert cost.spread == (pytest.approx(5.1), pytest.approx(96.9))
    assert speed.Cost("streams", [3.0, 1.0, 2.0]).spread == (1.0, 3.0)
    assert speed.Cost("streams", [3.0, 1.0, 2.0]).p99 is None


def test_the_command_writes_the_same_table_as_markdown_and_json(here, tmp_path):
    options = ["--window-size", "16", "--steps", "4", "--num-tokens", "20", "30", "--dense-tokens", "20"]
    model = ("--model-name-or-path", GOLDEN / "llama")
    status, out, _ = here("speed", *model, *options, "--output", tmp_path / "speed.md")
    assert status == 0
    record = json.loads((tmp_path / "speed.json").read_text())
    page = (tmp_path / "speed.md").read_text()
    for cost in record["costs"]:
        assert f"| {cost['what']} |" in page
        assert len(cost["timings"]) > 0
    assert "the seed's loop" in out
    assert record["versions"]["torch"] == torch.__version__


def test_the_floor_counts_the_cache_of_a_multi_query_model_once():
    model = tiny.ROTARY["falcon"]()
    assert speed.bytes_a_token(model, 10) - speed.bytes_a_token(model, 0) == 10 * 4 * 2 * 2 * 16  # one head a layer


def test_the_floor_counts_the_experts_that_a_token_is_sent_to_and_the_window_of_a_sliding_layer():
    model = tiny.STREAMABLE["gpt_oss"]()
    count, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    others = sum(p.numel() for p in model.parameters()) - experts - model.get_input_embeddings().weight.numel()
    assert count > chosen
    assert speed.bytes_a_token(model, 0) == 4 * (others + experts * chosen // count)
    window = model.config.sliding_window
    more = speed.bytes_a_token(model, window + 10) - speed.bytes_a_token(model, window)
    full = sum(kind == "full_attention" for kind in model.config.layer_types)
    assert 0 < full < len(model.config.layer_types)
    assert more == 10 * 4 * 2 * full * model.config.num_key_value_heads * model.config.head_dim
