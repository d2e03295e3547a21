"""Strategies that score their entries, against an oracle that goes through every head's entries one by one.

Rotations and attention are the oracle's own here; families with more of their own are in test_scored_families.py.

In float64 what is evicted is the same at every step, in every head. In float32 it is the same unless the choice was so
close that rounding decides; where that happens, all that follows may differ, and nothing more is compared.
"""

from functools import cache, partial

import eviction_oracle as brute
import pytest
import tiny
import torch
from evictions import RULES, assert_same, assert_same_but_for_rounding, both, run
from tiny import build

WINDOW, LENGTH = 8, 30
MODELS = {
    "llama-mha": partial(build, "llama", num_key_value_heads=4),
    "llama-gqa": partial(build, "llama", num_key_value_heads=2),
    "gemma-mqa": partial(build, "gemma", head_dim=16, num_key_value_heads=1),
    "gpt_neox": tiny.ROTARY["gpt_neox"],
    "qwen3": tiny.ROTARY["qwen3"],
}
each_rule = pytest.mark.parametrize("rule", RULES)
each_position = pytest.mark.parametrize("positions", ["text", "cache"])


@cache
def model_of(name, dtype):
    return MODELS[name]().to(dtype)


def protections():
    """Every model with protected tokens, those of few heads of keys also without; the others are ``heavy``."""
    for model in MODELS:
        for sizes in ((0, 0), (2, 3)):
            light = any(sizes) or model in ("llama-gqa", "gemma-mqa")
            yield pytest.param(model, *sizes, marks=() if light else pytest.mark.heavy)


@each_position
@each_rule
@pytest.mark.parametrize(("model", "sinks", "recent"), protections())
def test_in_float64_the_same_goes_at_every_step_and_nlls_agree_to_the_last_bits(model, sinks, recent, rule, positions):
    make = partial(model_of, model, torch.float64)
    assert_same(*both(make, rule, positions, sinks, recent, tiny.tokens(LENGTH), WINDOW, brute.scored))


@each_position
@each_rule
@pytest.mark.parametrize(("sinks", "recent"), [pytest.param(0, 0, marks=pytest.mark.heavy), (2, 3)])
@pytest.mark.parametrize("model", MODELS)
def test_in_float32_the_same_goes_unless_rounding_decides(model, sinks, recent, rule, positions):
    make = partial(model_of, model, torch.float32)
    answers = both(make, rule, positions, sinks, recent, tiny.tokens(LENGTH), WINDOW, brute.scored)
    assert_same_but_for_rounding(*answers)


@each_position
@each_rule
def test_a_stream_taken_up_in_the_middle_goes_on_as_if_it_had_not_been_cut(rule, positions):
    model, stream = model_of("llama-gqa", torch.float64), tiny.tokens(LENGTH)
    name, parameters, _ = RULES[rule]
    plan = tiny.plan(model, name, WINDOW, 1, positions, recent=2, **parameters)
    nll, evictions = run(model, plan, stream)
    for start in (WINDOW + 1, 23):
        rest, again = run(model, plan, stream, start)
        assert again == evictions
        assert (rest - nll[start:]).abs().max() <= 1e-9


@each_position
@pytest.mark.parametrize("model", ["llama-mha", "llama-gqa", "gemma-mqa", "gpt_neox"])
def test_on_text_with_repeats_knorm_evicts_the_oldest_of_equal_keys_whatever_the_dtype(model, positions):
    """In layer 0 two occurrences of a token have one norm before rotation; the oracle looks at them there."""
    stream = tiny.tokens(12)[torch.randint(12, (90,), generator=torch.Generator().manual_seed(2))]
    plan = tiny.plan(model_of(model, torch.float32), "knorm", 16, 1, positions, recent=4)
    single, double = (run(model_of(model, dtype), plan, stream)[1] for dtype in (torch.float32, torch.float64))
    exact = brute.Settings(brute.exact_knorm, 16, 1, 4, positions)
    assert single == double == brute.scored(model_of(model, torch.float64), stream, exact).evictions
