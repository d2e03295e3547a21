"""Weights that lie elsewhere between two calls, as Accelerate offloads them: all that reads gives the same numbers."""

import copy

import accelerate
import pytest
import tiny
from tiny import shared

from sinkbench.api.decoding import Session
from sinkbench.data.protocols import windows_of
from sinkbench.diagnostics import speed
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.windows import read_windows
from sinkbench.metrics.fluency import fresh_nll

families = pytest.mark.parametrize("family", ["llama", "gptj", "mpt", "falcon"])


def offloaded(family):
    model = copy.deepcopy(shared(family))
    accelerate.cpu_offload(model, execution_device="cpu")
    assert model.device.type == "meta"
    return model


def both(family, numbers):
    plain, away = numbers(shared(family)), numbers(offloaded(family))
    assert len(plain) > 10
    assert away == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *((family, "attention_sinks") for family in ("llama", "gptj", "mpt", "falcon")),
        *(("llama", strategy) for strategy in ("transformers", "tova", "recompute")),
    ],
)
@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_engines(family, strategy, engine):
    def numbers(model):
        plan, dense = tiny.plan(model, strategy, 12), tiny.plan(model, "transformers")
        runs = choose_engine(model, plan, engine, chunk=16, reference=dense).run(plan, tiny.tokens(40))
        return [value for steps in runs for value in (*steps.nll, *steps.columns["kl"])]

    both(family, numbers)


@families
def test_windows_of_protocols(family):
    tokens = tiny.tokens(60)
    windows = windows_of("windows", len(tokens), 20, None)
    both(family, lambda model: [x for steps in read_windows(model, tokens, windows, None) for x in steps.nll])


@families
@pytest.mark.parametrize("strategy", ["attention_sinks", "recompute"])
def test_sessions_and_fluency(family, strategy):
    def numbers(model):
        session = Session(model, tiny.plan(model, strategy, 12))
        logits = [session.read(tiny.tokens(30).tolist()), session.read([3])]
        return [*logits[0].tolist(), *logits[1].tolist(), *fresh_nll(model, tiny.tokens(9), tiny.tokens(12))]

    both(family, numbers)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_the_seeds_loop_and_all_that_is_timed_beside_it(family):
    both(family, lambda model: [x for steps in speed.seed_loop(model, 12, 4, tiny.tokens(40)) for x in steps.nll])
    timings = speed.Timings(window=12, sinks=4, steps=3, streams=[20], dense=0)
    costs = list(speed.measure(offloaded(family), timings))
    assert {cost.each for cost in costs} == {"probe", "step", "stream"}
    assert all(cost.ms > 0 for cost in costs)
