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


def captured(model, plan, tokens, start=0, quick=False):
    """What the engine gives, by a graph, is what the plain way does."""
    lines = []
    got = read(Captured(model, quick, lines.append), plan, tokens, start)
    wanted = read(Stepwise(model), plan, tokens)[start:]
    assert not lines
    assert got == pytest.approx(wanted, abs=1e-3)


@strategies
@every_family
def test_a_captured_graph_gives_the_numbers_of_the_plain_engine(family, strategy, positions, start):
    model, plan = admitted(family, strategy, positions)
    captured(model, plan, tiny.tokens(LENGTH), start, False)


@every_family
def test_so_does_one_whose_parts_run_on_our_kernels(family):
    model, plan = admitted(family, "attention_sinks")
    captured(model, plan, tiny.tokens(LENGTH), 70, True)


@strategies
@pytest.mark.parametrize("family", ["llama", "stablelm", "gptj", "gemma2", "mpt"])
def test_our_kernels_keep_what_each_strategy_keeps(family, strategy, positions, start):
    model, plan = admitted(family, strategy, positions)
    captured(model, plan, tiny.tokens(LENGTH), start, True)


@pytest.mark.parametrize("quick", [False, True])
def test_a_dense_graph_goes_on_when_its_cache_has_grown(quick):
    model, plan = admitted("llama", "transformers")
    captured(model, plan, tiny.tokens(2500), 0, quick)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("strategy", ["attention_sinks", "transformers"])
def test_documents_go_through_one_graph(strategy, quick):
    model, plan = admitted("llama", strategy)
    streams, lines = [tiny.tokens(n, n) for n in (150, 40, 1100, 2, 90)], []
    found = [[] for _ in streams]
    for index, step in Captured(model, quick, lines.append).run_many(plan, streams):
        found[index] += step.nll
    assert not lines
    for nll, stream in zip(found, streams, strict=True):
        assert torch.tensor(nll) == pytest.approx(read(Stepwise(model), plan, stream), abs=1e-3)


def test_these_alone_are_refused():
    """The tests above skip what is refused, and nothing else."""
    refused = set()
    for family, build in tiny.STREAMABLE.items():
        model = build().cuda()
        if Captured(model).refuses(tiny.plan(model, "attention_sinks", WINDOW, SINKS)):
            refused.add(family)
    assert refused == {"dynamic", "longrope", "qwen3_next"}
