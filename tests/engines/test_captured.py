"""Rings in place of a cache: what a captured step computes, run here without capturing it."""

from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from sinkbench import strategies
from sinkbench.engines import captured as module
from sinkbench.engines.captured import CapturedStream
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.stepwise import stepwise

WINDOW, SINKS = 24, 4
MODELS = {name: tiny.STREAMABLE[name] for name in ("llama", "qwen3", "gpt_neox", "gptj", "cohere", "gemma3", "llama3")}
MODELS["mistral-sliding"] = partial(tiny.build, "mistral", sliding_window=8, **tiny.GROUPED)
STRATEGIES = ("attention_sinks", "windowed", "transformers")


class Uncaptured(CapturedStream):
    """Runs a step where the real one replays it."""

    def capture(self):
        self.graph = SimpleNamespace(replay=self._step)


@torch.no_grad()
def through_rings(model, keep, tokens, start=0):
    stream = Uncaptured(model, keep, tokens, compiled=False)
    if start:
        stream.prime(prefilled(model, keep, tokens[:start]))
    nll = []
    with stream:
        for _ in range(start, len(tokens) - 1):
            stream.prepare()
            nll.append(stream.step())
    return torch.tensor(nll)


def one_by_one(model, keep, tokens, start=0):
    return torch.tensor([step.nll[0] for step in stepwise(model, keep, tokens, start)])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_over_rings_is_a_step_of_the_plain_engine(name, strategy, monkeypatch):
    monkeypatch.setattr(module, "REACH", 64)  # so that rings are turned back within the test
    monkeypatch.setattr(module, "BLOCK", 32)  # so that dense rings grow
    model, tokens = MODELS[name](), tiny.tokens(200)
    keep = strategies.resolve(strategy, WINDOW, SINKS)
    wanted = one_by_one(model, keep, tokens)
    assert through_rings(model, keep, tokens) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rings_in_half_precision_differ_by_rounding_alone(strategy, dtype):
    model, tokens = MODELS["llama"](initializer_range=0.05).to(dtype), tiny.tokens(300)
    keep = strategies.resolve(strategy, WINDOW, SINKS)
    got, wanted = through_rings(model, keep, tokens), one_by_one(model, keep, tokens)
    assert (got - wanted).abs().mean() <= 0.01
    assert float((got.mean() - wanted.mean()).exp()) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("start", [1, WINDOW - 1, WINDOW, WINDOW + 1, 100])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rings_take_up_a_stream_wherever_it_was_left(strategy, start, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    model, tokens = MODELS["llama"](), tiny.tokens(150)
    keep = strategies.resolve(strategy, WINDOW, SINKS)
    wanted = one_by_one(model, keep, tokens)[start:]
    assert through_rings(model, keep, tokens, start) == pytest.approx(wanted, abs=2e-4)


def test_one_stream_after_the_other_finds_its_rings_under_the_same_handles():
    model, tokens = MODELS["llama"](), tiny.tokens(5)
    handles = []
    for strategy in ("windowed", "attention_sinks"):
        with Uncaptured(model, strategies.resolve(strategy, WINDOW, SINKS), tokens, compiled=False) as stream:
            handles.append(stream.handles)
    assert handles[0] == handles[1]
    assert not module._rings
