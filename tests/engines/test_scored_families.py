"""Strategies that score their entries, on every family, against the attention of the model itself.

The oracle hides what is dead, for each head, from an attention that knows all of the text; so ALiBi's terms, caps, the
learned logits of gpt-oss, layers without positions, with windows or states of their own, are those of transformers.
"""

from functools import partial

import pytest
import tiny
import torch
from evictions import RULES, assert_same, assert_same_but_for_rounding, both
from own_attention import Double, by_own_attention

WINDOW, SINKS, RECENT, LENGTH = 8, 2, 3, 30
POSITIONS = ("text", "cache")
WITH_EXPERTS = ("gpt_oss", "qwen3_next")  # whose fused products know no float64


def make(family, dtype=torch.float64):
    """A new one each time: some remember how far they have come."""
    model = tiny.STREAMABLE[family](attn="eager").to(dtype)
    if family in WITH_EXPERTS:
        model.set_experts_implementation("eager")
    return model


def combinations(*rules):
    """Every family with ``rules`` at places in the cache; a few also in the text, and with rules of other patterns.

    The others are ``heavy``.
    """
    for family in tiny.STREAMABLE:
        for rule in RULES:
            for positions in POSITIONS:
                few = family in tiny.FEW
                light = (few and rule in ("tova", "keydiff")) or (rule in rules and (few or positions == "cache"))
                yield pytest.param(family, rule, positions, marks=() if light else pytest.mark.heavy)


@pytest.mark.parametrize(("family", "rule", "positions"), combinations("h2o"))
def test_in_float64_every_family_evicts_the_same(family, rule, positions):
    stream = tiny.tokens(LENGTH)
    with Double():
        answers = both(partial(make, family), rule, positions, SINKS, RECENT, stream, WINDOW, by_own_attention)
    assert_same(*answers)


@pytest.mark.parametrize(("family", "rule", "positions"), combinations())
def test_in_float32_every_family_evicts_the_same_unless_rounding_decides(family, rule, positions):
    new = partial(make, family, torch.float32)
    stream = tiny.tokens(LENGTH)
    assert_same_but_for_rounding(*both(new, rule, positions, SINKS, RECENT, stream, WINDOW, by_own_attention))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("window", [12, 70])
@pytest.mark.parametrize("family", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_those_of_the_model(family, window, positions):
    """They change at 64 tokens: in the text, and in a cache that is as long."""
    stream = tiny.tokens(90)
    with Double():
        answers = both(partial(make, family), "h2o", positions, SINKS, RECENT, stream, window, by_own_attention)
    assert_same(*answers)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("window", "governed"), [(6, 2), (20, 0)])
def test_windows_of_the_model_alone_are_governed_where_the_strategy_has_the_narrower_one(window, governed, positions):
    """(Mistral with a window of 8 in both layers.)"""

    def new():
        return tiny.build("mistral", attn="eager", sliding_window=8, **tiny.GROUPED).double()

    with Double():
        nll, evictions, wanted = both(new, "h2o", positions, 1, 2, tiny.tokens(40), window, by_own_attention)
    assert len({layer for layer, _ in evictions}) == governed
    assert_same(nll, evictions, wanted)
