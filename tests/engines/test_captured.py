"""Rings in place of a cache: what a captured step computes, run here without capturing it."""

from functools import cache, partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from sinkbench.engines import replay as module
from sinkbench.engines.captured import Captured, refuses_rings
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.replay import CapturedStream
from sinkbench.engines.stepwise import Stepwise

WINDOW, SINKS = 24, 4
MODELS = {
    name: tiny.STREAMABLE[name]
    for name in ("llama", "qwen3", "gpt_neox", "gptj", "falcon-grouped", "cohere", "gemma3", "llama3")
}
MODELS |= tiny.ALIBI
MODELS |= {name: tiny.STREAMABLE[name] for name in ("gemma2", "gpt_oss")}
MODELS["mistral-sliding"] = partial(tiny.build, "mistral", sliding_window=8, **tiny.GROUPED)
STRATEGIES = {
    "attention_sinks": {},
    "windowed": {},
    "transformers": {},
    "context_shift": {},
    "pyramid": {"beta": 2},
}


class Uncaptured(CapturedStream):
    """Runs a step where the real one replays it."""

    def capture(self):
        self.graph = SimpleNamespace(replay=self._step)


@torch.no_grad()
def through_rings(model, plan, tokens, start=0):
    stream = Uncaptured(model, plan, tokens, quick=False)
    if start:
        stream.prime(prefilled(model, plan, tokens[:start]))
    nll = []
    with stream:
        for _ in range(start, len(tokens) - 1):
            assert stream.prepared() is None
            stream.launch()
            nll.append(stream.ended()[0])
    return torch.tensor(nll)


def one_by_one(model, plan, tokens, start=0):
    return torch.tensor([step.nll[0] for step in Stepwise(model).run(plan, tokens, start)])


@cache
def alone(strategy, stream):
    """What the plain engine says of a stream, told by ``(tokens, seed)``."""
    model = tiny.shared("llama")
    return one_by_one(model, plan_of(model, strategy), tiny.tokens(*stream))


def plan_of(model, strategy, positions=None):
    return tiny.plan(model, strategy, WINDOW, SINKS, positions, **STRATEGIES[strategy])


def combinations():
    """Every model with two strategies, a few with all of them; the others are ``heavy``."""
    few, always = {"llama", "gemma3"}, {("attention_sinks", "cache"), ("pyramid", "text")}
    for name in MODELS:
        for strategy in STRATEGIES:
            for positions in ("cache", "text") if strategy != "transformers" else ("cache",):
                needed = name in few or (strategy, positions) in always
                yield pytest.param(name, strategy, positions, marks=() if needed else pytest.mark.heavy)


@pytest.mark.parametrize(("name", "strategy", "positions"), combinations())
def test_a_step_over_rings_is_a_step_of_the_plain_engine(name, strategy, positions, monkeypatch):
    monkeypatch.setattr(module, "REACH", 64)  # so that rings are turned back within the test
    monkeypatch.setattr(module, "BLOCK", 32)  # so that dense rings grow
    model, tokens = MODELS[name](), tiny.tokens(120)  # the rings are turned back twice, and grow thrice
    plan = plan_of(model, strategy, positions)
    wanted = one_by_one(model, plan, tokens)
    assert through_rings(model, plan, tokens) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize(
    ("dtype", "strategy"), [*((torch.bfloat16, name) for name in STRATEGIES), (torch.float16, "attention_sinks")]
)
def test_rings_in_half_precision_differ_by_rounding_alone(dtype, strategy):
    model, tokens = MODELS["llama"](initializer_range=0.05).to(dtype), tiny.tokens(300)
    plan = plan_of(model, strategy)
    got, wanted = through_rings(model, plan, tokens), one_by_one(model, plan, tokens)
    assert (got - wanted).abs().mean() <= 0.01
    assert float((got.mean() - wanted.mean()).exp()) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("start", [1, WINDOW - 1, WINDOW, WINDOW + 1, 100])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rings_take_up_a_stream_wherever_it_was_left(strategy, start, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    model, stream = tiny.shared("llama"), (130, 0)
    found = through_rings(model, plan_of(model, strategy), tiny.tokens(*stream), start)
    assert found == pytest.approx(alone(strategy, stream)[start:], abs=2e-4)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_a_step_that_cannot_be_captured_is_taken_the_plain_way_with_one_line(name, monkeypatch):
    def fail(self):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(CapturedStream, "capture", fail)
    model, tokens, lines = MODELS[name](), tiny.tokens(60), []
    plan = plan_of(model, "attention_sinks")
    engine = Captured(model, quick=False, note=lines.append)
    got = torch.tensor([step.nll[0] for step in engine.run(plan, tokens, 20)])
    assert got == pytest.approx(one_by_one(model, plan, tokens)[20:], abs=2e-4)
    assert len(lines) == 1
    assert "operation not permitted when stream is capturing" in lines[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("first", "start"), [(0, 0), (1, 50), (2, 0)])
def test_documents_go_through_one_graph_one_after_the_other(strategy, first, start, monkeypatch):
    monkeypatch.setattr(module, "REACH", 64)
    monkeypatch.setattr(module, "BLOCK", 32)
    made = []
    monkeypatch.setattr(
        "sinkbench.engines.captured.CapturedStream", lambda *args: made.append(Uncaptured(*args)) or made[-1]
    )
    model, streams = tiny.shared("llama"), [(40, 40), (120, 120), (2, 2), (90, 90)]
    plan, tokens = plan_of(model, strategy), [tiny.tokens(*stream) for stream in streams]
    found = {index: [] for index in range(first, len(streams))}
    for index, step in Captured(model, quick=False).run_many(plan, tokens, first, start):
        found[index] += step.nll
    for index, nll in found.items():
        wanted = alone(strategy, streams[index])[start if index == first else 0 :]
        assert torch.tensor(nll) == pytest.approx(wanted, abs=2e-4)
    assert len(made) == 1


def test_documents_behind_one_that_cannot_be_captured_are_read_the_plain_way(monkeypatch):
    def fail(self):
        if self.fed:
            raise RuntimeError("no more")
        self.graph = SimpleNamespace(replay=self._step)

    monkeypatch.setattr(module, "BLOCK", 32)  # a dense stream grows, and is captured anew
    monkeypatch.setattr(CapturedStream, "capture", fail)
    model, streams, lines, found = MODELS["llama"](), [tiny.tokens(n, n) for n in (20, 50, 30)], [], [[], [], []]
    plan = plan_of(model, "transformers")
    for index, step in Captured(model, quick=False, note=lines.append).run_many(plan, streams):
        found[index] += step.nll
    for nll, stream in zip(found, streams, strict=True):
        assert torch.tensor(nll) == pytest.approx(one_by_one(model, plan, stream), abs=2e-4)
    assert len(lines) == 1


def test_experts_are_their_own_again_behind_a_captured_stream():
    model = tiny.STREAMABLE["gpt_oss"]()
    model.set_experts_implementation("grouped_mm")
    with Uncaptured(model, plan_of(model, "attention_sinks"), tiny.tokens(9), False):
        assert set(model.get_experts_implementation().values()) == {"batched_mm"}
    assert set(model.get_experts_implementation().values()) == {"grouped_mm"}


def test_a_row_is_handed_on_while_the_next_step_runs(monkeypatch):
    launched = []

    class Noting(Uncaptured):
        def launch(self):
            super().launch()
            launched.append(self.fed)

    monkeypatch.setattr("sinkbench.engines.captured.CapturedStream", Noting)
    model = tiny.shared("llama")
    plan = plan_of(model, "attention_sinks")
    behind = [(step.first, launched[-1]) for step in Captured(model, quick=False).run(plan, tiny.tokens(6))]
    assert behind == [(1, 2), (2, 3), (3, 4), (4, 5), (5, 5)]


def test_rows_before_a_cache_that_cannot_grow_are_all_there(monkeypatch):
    class Full(Uncaptured):
        def _grow(self):
            raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr("sinkbench.engines.captured.CapturedStream", Full)
    model, rows = tiny.shared("llama"), []
    with pytest.raises(torch.OutOfMemoryError):
        for step in Captured(model, quick=False).run(plan_of(model, "transformers"), tiny.tokens(60)):
            rows.append(step)
    assert [step.first for step in rows] == list(range(1, 33))


@pytest.mark.parametrize("family", ["dynamic", "longrope"])
def test_frequencies_that_are_chosen_on_the_host_are_not_captured(family):
    model = tiny.SCALED[family]()
    for strategy in STRATEGIES:
        assert "host" in refuses_rings(model, plan_of(model, strategy))
