"""Chunks under way at once on CUDA: what is computed is what is computed one after the other, to the last bit."""

import pytest
import tiny
import torch
from evictions import RULES

from sinkbench.engines import lanes
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.streams import run_many

pytestmark = pytest.mark.cuda

LENGTHS = (1500, 400, 401, 1499, 2)


def deep(dtype):
    model = tiny.build("llama", num_hidden_layers=12, initializer_range=0.1, **tiny.GROUPED)
    return model.to("cuda", dtype)


def said(engine, plan, streams):
    found = [[] for _ in streams]
    for index, steps in run_many(engine, plan, streams):
        found[index].append((steps.nll, steps.columns))
    return found


@pytest.fixture
def made(monkeypatch):
    """The lanes that caches were given."""
    found, make = [], lanes.Lanes

    def noted(*given):
        found.append(make(*given))
        return found[-1]

    monkeypatch.setattr(lanes, "Lanes", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_lanes_change_no_bit(rule, dtype, made, monkeypatch):
    name, values, _ = RULES[rule]
    model = deep(dtype)
    plan = tiny.plan(model, name, 48, 2, recent=3, **values)
    streams = [tiny.tokens(length, i) for i, length in enumerate(LENGTHS)]
    engine = Parallel(model, 50, side_by_side=4)
    found = [said(engine, plan, streams), said(engine, plan, streams[:1])]
    assert min(one.count for one in made) > 1
    monkeypatch.setattr(lanes, "LANES", 1)
    made.clear()
    assert found == [said(engine, plan, streams), said(engine, plan, streams[:1])]
    assert {one.count for one in made} == {1}


def test_two_strategies_whose_programs_wait_for_each_other_take_turns(made):
    """None may keep another's from running."""
    model = deep(torch.float32)
    plan, other = (tiny.plan(model, name, 48, 2) for name in ("tova", "h2o"))
    stream = tiny.tokens(1500)
    alone = said(Parallel(model, 50), plan, [stream])
    beside = said(Parallel(model, 50, reference=other), plan, [stream])
    assert [nll for nll, _ in alone[0]] == [nll for nll, _ in beside[0]]
    itself = said(Parallel(model, 50, reference=plan), plan, [stream])
    assert {kl for _, columns in itself[0] for kl in columns["kl"]} == {0.0}
    assert [one.count > 1 for one in made] == [True, False, False, False, False]


def test_what_is_asked_of_the_device_behind_an_abandoned_stream_finds_its_chunks_done(made):
    """Their memory is free by then, and soon another's."""
    model = deep(torch.float32)
    steps = Parallel(model, 50).run(tiny.plan(model, "tova", 48, 2), tiny.tokens(1500))
    next(steps)
    steps.close()
    torch.cuda.current_stream().synchronize()
    assert all(stream.query() for stream in made[0].streams)


@pytest.mark.parametrize("strategy", ["attention_sinks", "transformers"])
def test_what_goes_by_position_has_a_single_lane(strategy, made):
    model = deep(torch.float32)
    said(Parallel(model, 50), tiny.plan(model, strategy, 48, 2), [tiny.tokens(200)])
    assert {one.count for one in made} == {1}
