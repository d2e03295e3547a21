"""A captured step gives the numbers of the plain engine, on CUDA, for every family that can be captured."""

import pytest
import tiny
import torch

from sinkbench.engines.captured import can_capture, captured
from sinkbench.engines.stepwise import stepwise
from sinkbench.strategies import resolve

pytestmark = pytest.mark.cuda

WINDOW, SINKS, LENGTH = 24, 4, 200
every_family = pytest.mark.parametrize("family", tiny.STREAMABLE)
strategies = pytest.mark.parametrize("strategy", ("attention_sinks", "windowed", "transformers"))


def admitted(family, strategy):
    """The model and what it keeps; skips, by name, what is not captured."""
    model, keep = tiny.STREAMABLE[family]().cuda(), resolve(strategy, WINDOW, SINKS)
    if not can_capture(model, keep):
        pytest.skip(f"{family} is not captured under {strategy}")
    return model, keep


def read(engine, *arguments):
    return torch.tensor([nll for step in engine(*arguments) for nll in step.nll])


@strategies
@every_family
@pytest.mark.parametrize("start", [0, 70])
def test_a_captured_graph_gives_the_numbers_of_the_plain_engine(family, strategy, start):
    model, keep = admitted(family, strategy)
    tokens = tiny.tokens(LENGTH)
    wanted = read(stepwise, model, keep, tokens)[start:]
    assert read(captured, model, keep, tokens, start, False) == pytest.approx(wanted, abs=1e-3)


@every_family
def test_so_does_one_that_is_compiled_before(family):
    model, keep = admitted(family, "attention_sinks")
    tokens = tiny.tokens(LENGTH)
    wanted = read(stepwise, model, keep, tokens)[70:]
    assert read(captured, model, keep, tokens, 70, True) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dense_graph_goes_on_when_its_cache_has_grown(compiled):
    model, keep = admitted("llama", "transformers")
    tokens = tiny.tokens(2500)
    wanted = read(stepwise, model, keep, tokens)
    assert read(captured, model, keep, tokens, 0, compiled) == pytest.approx(wanted, abs=1e-3)


def test_most_rotary_families_are_captured():
    """Else the tests above could all be skipped."""
    keep = resolve("attention_sinks", WINDOW, SINKS)
    refused = {family for family, build in tiny.ROTARY.items() if not can_capture(build().cuda(), keep)}
    assert len(refused) <= len(tiny.ROTARY) // 4
