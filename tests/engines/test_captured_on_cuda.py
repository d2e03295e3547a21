"""A captured step gives the numbers of the plain engine, on CUDA, for every family that can be captured."""

import pytest
import tiny
import torch

from sinkbench.engines.captured import Captured
from sinkbench.engines.stepwise import Stepwise

pytestmark = pytest.mark.cuda

WINDOW, SINKS, LENGTH = 24, 4, 200
every_family = pytest.mark.parametrize("family", tiny.STREAMABLE)
PARAMETERS = {"pyramid": {"beta": 2}}
strategies = pytest.mark.parametrize(
    ("strategy", "positions", "start"),
    [
        ("attention_sinks", "cache", 0),
        ("attention_sinks", "text", 0),
        ("windowed", "cache", 70),
        ("transformers", "text", 0),
        ("context_shift", "cache", 70),
        ("pyramid", "text", 70),
    ],
)


def admitted(family, strategy, positions=None):
    """The model and what it keeps; skips, by name, what is not captured."""
    model = tiny.STREAMABLE[family]().cuda()
    plan = tiny.plan(model, strategy, WINDOW, SINKS, positions, **PARAMETERS.get(strategy, {}))
    reason = Captured(model).refuses(plan)
    if reason is not None:
        pytest.skip(f"{family} is not captured under {strategy}: {reason}")
    return model, plan


def read(engine, plan, tokens, start=0):
    return torch.tensor([nll for step in engine.run(plan, tokens, start) for nll in step.nll])


def fails(line):
    raise AssertionError(line)


@strategies
@every_family
def test_a_captured_graph_gives_the_numbers_of_the_plain_engine(family, strategy, positions, start):
    model, plan = admitted(family, strategy, positions)
    tokens = tiny.tokens(LENGTH)
    wanted = read(Stepwise(model), plan, tokens)[start:]
    assert read(Captured(model, False, fails), plan, tokens, start) == pytest.approx(wanted, abs=1e-3)


@every_family
def test_so_does_one_that_is_compiled_before(family):
    model, plan = admitted(family, "attention_sinks")
    tokens = tiny.tokens(LENGTH)
    wanted = read(Stepwise(model), plan, tokens)[70:]
    assert read(Captured(model, True, fails), plan, tokens, 70) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_dense_graph_goes_on_when_its_cache_has_grown(compiled):
    model, plan = admitted("llama", "transformers")
    tokens = tiny.tokens(2500)
    wanted = read(Stepwise(model), plan, tokens)
    assert read(Captured(model, compiled, fails), plan, tokens) == pytest.approx(wanted, abs=1e-3)


def test_most_rotary_families_are_captured():
    """Else the tests above could all be skipped."""
    models = {family: build().cuda() for family, build in tiny.ROTARY.items()}
    refused = {f for f, m in models.items() if Captured(m).refuses(tiny.plan(m, "attention_sinks", WINDOW, SINKS))}
    assert len(refused) <= len(tiny.ROTARY) // 4
