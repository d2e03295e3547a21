"""What layers evict, seen from the side of the tests, and held against what an oracle says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import eviction_oracle as brute
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stack import Stack
from sinkbench.engines.base import Engine
from sinkbench.engines.stepwise import Stepwise
from sinkbench.strategies import Plan
from sinkbench.strategies.draws import draw
from sinkbench.strategies.knorm import Knorm

Evictions = dict[tuple[int, int], list[tuple[int, int]]]
Oracle = Callable[[PreTrainedModel, Tensor, brute.Settings], brute.Answer]
CLOSE = 1e-5  # margins of choices that rounding decides in float32
SEED = 3


@cache
def _draws(layer: int) -> list[list[float]]:
    """The numbers that the package draws, which the oracle is given: for 4 heads and 100 tokens."""
    return draw(SEED, torch.tensor(layer), torch.arange(100).expand(1, 4, -1))[0].tolist()


RULES: dict[str, tuple[str, dict[str, Any], brute.Score]] = {
    "h2o": ("h2o", {}, brute.h2o),
    "h2o-average": ("h2o", {"average": True}, partial(brute.h2o, average=True)),
    "tova": ("tova", {}, brute.tova),
    "knorm": ("knorm", {}, brute.knorm),
    "keydiff": ("keydiff", {}, brute.keydiff),
    "random": ("random", {"seed": SEED}, brute.random(lambda layer, head, token: _draws(layer)[head][token])),
}


@contextmanager
def watched() -> Iterator[Evictions]:
    """What layers evict within this context: steps and tokens of each layer and head of the first stream."""
    found: Evictions = {}
    drop, keep = Stack.drop, ScoredLayer.keep

    def watch(stack: Stack, slots: Tensor) -> None:
        gone = stack.tokens.gather(2, slots)[:: stack.streams, :, 0].tolist()
        for layer, tokens in zip(stack.layers, gone, strict=True):
            for head, token in enumerate(tokens):
                found.setdefault((layer.number, head), []).append((layer.seen - 1, token))
        drop(stack, slots)

    def watch_chunk(layer: ScoredLayer, died: Tensor) -> None:
        columns = layer.columns
        assert columns is not None
        tokens, n = columns.tokens[0].tolist(), columns.tokens.shape[2] - columns.held
        keep(layer, died)
        for head, (mine, when) in enumerate(zip(tokens, died[0].tolist(), strict=True)):
            gone = sorted((layer.seen - n + i, t) for i, t in zip(when, mine, strict=True) if i < n)
            if gone:
                found.setdefault((layer.number, head), []).extend(gone)

    with patch.object(Stack, "drop", watch), patch.object(ScoredLayer, "keep", watch_chunk):
        yield found


def read(engine: Engine, plan: Plan, stream: Tensor, start: int = 0) -> tuple[Tensor, Evictions]:
    """The NLLs of ``engine``, and what was evicted."""
    with watched() as evictions:
        nll = [value for steps in engine.run(plan, stream, start) for value in steps.nll]
    return torch.tensor(nll, dtype=torch.float64), evictions


def run(model: PreTrainedModel, plan: Plan, stream: Tensor, start: int = 0) -> tuple[Tensor, Evictions]:
    """As :func:`read`, token by token."""
    return read(Stepwise(model), plan, stream, start)


def both(
    make: Callable[[], PreTrainedModel],
    rule: str,
    positions: str,
    sinks: int,
    recent: int,
    stream: Tensor,
    window: int,
    oracle: Oracle,
) -> tuple[Tensor, Evictions, brute.Answer]:
    """What the package answers, and what the oracle does, each from a model that ``make`` makes."""
    name, parameters, score = RULES[rule]
    model = make()
    plan = tiny.plan(model, name, window, sinks, positions, recent=recent, **parameters)
    tie = Knorm.tolerance if name == "knorm" else 0.0
    settings = brute.Settings(score, window, sinks, recent, positions, tie)
    return *run(model, plan, stream), oracle(make(), stream, settings)


def assert_same(nll: Tensor, evictions: Evictions, wanted: brute.Answer) -> None:
    """In float64: the same goes at every step, and NLLs agree to the last bits."""
    assert evictions == wanted.evictions
    assert (nll - wanted.nll).abs().max() <= 1e-9


def assert_same_but_for_rounding(nll: Tensor, evictions: Evictions, wanted: brute.Answer) -> None:
    """In float32: the same goes until a choice is so close that rounding decides it, which is reported."""
    difference = first_difference(evictions, wanted.evictions)
    last = len(nll)
    if difference is not None:
        last, layer, heads = difference
        margins = [wanted.margins[layer, head, last] for head in heads]
        print(f"parted at step {last}, layer {layer}, heads {heads}: margins {margins}")
        assert max(margins) < CLOSE
    assert (nll - wanted.nll)[: last + 1].abs().max() <= 2e-4


def first_difference(ours: Evictions, theirs: Evictions) -> tuple[int, int, list[int]] | None:
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
