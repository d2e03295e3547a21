"""Strategies that score their entries, against an oracle that goes through every head's entries one by one.

In float64 what is evicted is the same at every step, in every head. In float32 it is the same unless the choice was so
close that rounding decides; where that happens, all that follows may differ, and nothing more is compared.
"""

from functools import cache, partial

import eviction_oracle as brute
import pytest
import tiny
import torch
from evictions import watched
from tiny import build

from sinkbench.engines.stepwise import Stepwise
from sinkbench.strategies.draws import draw
from sinkbench.strategies.knorm import Knorm

WINDOW, LENGTH, CLOSE = 8, 30, 1e-5
MODELS = {
    "llama-mha": partial(build, "llama", num_key_value_heads=4),
    "llama-gqa": partial(build, "llama", num_key_value_heads=2),
    "gemma-mqa": partial(build, "gemma", head_dim=16, num_key_value_heads=1),
    "gpt_neox": tiny.ROTARY["gpt_neox"],
    "qwen3": tiny.ROTARY["qwen3"],
}
REGISTERED = ("mistral", "qwen2", "stablelm", "phi", "phi3", "olmo", "olmo2", "cohere", "glm", "glm4")
REGISTERED += ("linear", "llama3", "yarn")
OWN_ATTENTION = [(f, p) for f in ("falcon", "gptj", "gptj-whole-head", "codegen") for p in ("text", "cache")]
# A model adds its ALiBi terms to all heads alike, as to consecutive places. (Falcon's eager attention adds them twice.)
OWN_ATTENTION += [("bloom", "cache"), ("mpt", "cache")]
SEED = 3


@cache
def draws(layer):
    """The numbers that the package draws, which the oracle is given: for 4 heads and all tokens."""
    return draw(SEED, layer, torch.arange(LENGTH).expand(1, 4, -1))[0].tolist()


RULES = {
    "h2o": ("h2o", {}, brute.h2o),
    "h2o-average": ("h2o", {"average": True}, partial(brute.h2o, average=True)),
    "tova": ("tova", {}, brute.tova),
    "knorm": ("knorm", {}, brute.knorm),
    "keydiff": ("keydiff", {}, brute.keydiff),
    "random": ("random", {"seed": SEED}, brute.random(lambda layer, head, token: draws(layer)[head][token])),
}

each_rule = pytest.mark.parametrize("rule", RULES)
each_position = pytest.mark.parametrize("positions", ["text", "cache"])


@cache
def model_of(name, dtype):
    return MODELS[name]().to(dtype)


def run(model, plan, stream, start=0):
    """NLLs, and what was evicted."""
    with watched() as evictions:
        nll = [value for steps in Stepwise(model).run(plan, stream, start) for value in steps.nll]
    return torch.tensor(nll, dtype=torch.float64), evictions


def both(model, rule, positions, sinks, recent, stream, window=WINDOW, oracle=brute.scored):
    """The package's answer and the oracle's."""
    name, parameters, score = RULES[rule]
    plan = tiny.plan(model, name, window, sinks, positions, recent=recent, **parameters)
    tie = Knorm.tolerance if name == "knorm" else 0.0
    return run(model, plan, stream), oracle(model, stream, brute.Settings(score, window, sinks, recent, positions, tie))


def first_difference(ours, theirs):
    """Step and layer at which evictions differ first, and the heads where they do; ``None`` where they are the same."""
    assert ours.keys() == theirs.keys()
    differences = sorted(
        (step, layer, head)
        for layer, head in ours
        for (step, mine), (_, wanted) in zip(ours[layer, head], theirs[layer, head], strict=True)
        if mine != wanted
    )
    if not differences:
        return None
    step, layer, _ = differences[0]
    return step, layer, [head for s, la, head in differences if (s, la) == (step, layer)]


@each_position
@each_rule
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
@pytest.mark.parametrize("model", MODELS)
def test_in_float64_the_same_goes_at_every_step_and_nlls_agree_to_the_last_bits(model, sinks, recent, rule, positions):
    (nll, evictions), wanted = both(model_of(model, torch.float64), rule, positions, sinks, recent, tiny.tokens(LENGTH))
    assert evictions == wanted.evictions
    assert (nll - wanted.nll).abs().max() <= 1e-9


@each_position
@each_rule
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 3)])
@pytest.mark.parametrize("model", MODELS)
def test_in_float32_the_same_goes_unless_rounding_decides(model, sinks, recent, rule, positions):
    (nll, evictions), wanted = both(model_of(model, torch.float32), rule, positions, sinks, recent, tiny.tokens(LENGTH))
    difference = first_difference(evictions, wanted.evictions)
    last = len(nll)
    if difference is not None:
        last, layer, heads = difference
        margins = [wanted.margins[layer, head, last] for head in heads]
        print(f"parted at step {last}, layer {layer}, heads {heads}: margins {margins}")
        assert max(margins) < CLOSE
    assert (nll - wanted.nll)[: last + 1].abs().max() <= 2e-4


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


@each_position
@pytest.mark.parametrize("rule", ["h2o", "keydiff"])
@pytest.mark.parametrize("family", REGISTERED)
def test_every_family_whose_attention_can_be_registered_evicts_the_same(family, rule, positions):
    model, stream = tiny.shared(family), tiny.tokens(LENGTH)
    (nll, evictions), wanted = both(model, rule, positions, 2, 3, stream)
    assert evictions == wanted.evictions
    assert (nll - wanted.nll).abs().max() <= 2e-4


@pytest.mark.parametrize("rule", ["h2o", "keydiff"])
@pytest.mark.parametrize(("family", "positions"), OWN_ATTENTION)
def test_families_with_an_attention_of_their_own_evict_the_same(family, positions, rule):
    model, stream = tiny.STREAMABLE[family](attn="eager"), tiny.tokens(LENGTH)
    (nll, evictions), wanted = both(model, rule, positions, 2, 3, stream, oracle=brute.scored_by_own_attention)
    assert evictions == wanted.evictions
    assert (nll - wanted.nll).abs().max() <= 2e-4
