"""Streams side by side on CUDA: each says what it says alone, whatever kernels the batch goes through."""

import pytest
import tiny
import torch
from evictions import RULES

from sinkbench.engines.parallel import Parallel
from sinkbench.engines.streams import run_many

pytestmark = pytest.mark.cuda

BY_POSITION = {"attention_sinks": {}, "windowed": {}, "transformers": {}, "context_shift": {}, "pyramid": {"beta": 2}}
STRATEGIES = {name: (name, values) for name, values in BY_POSITION.items()}
STRATEGIES |= {rule: (name, {**values, "recent": 3}) for rule, (name, values, _) in RULES.items()}
LENGTHS = (120, 61, 2, 117, 60, 233)


def agree(model, plan, close):
    streams = [tiny.tokens(length, i) for i, length in enumerate(LENGTHS)]
    found = [[] for _ in streams]
    for index, steps in run_many(Parallel(model, 50, side_by_side=4), plan, streams):
        found[index] += steps.nll
    for got, stream in zip(found, streams, strict=True):
        wanted = [x for steps in Parallel(model, 50).run(plan, stream) for x in steps.nll]
        apart = (torch.tensor(got, dtype=torch.float64) - torch.tensor(wanted, dtype=torch.float64)).abs()
        assert len(got) == len(stream) - 1
        assert apart.max() <= close if model.dtype != torch.bfloat16 else apart.mean() <= close


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["llama", "falcon", "gemma2", "mpt", "gptj", "cohere2"])
def test_in_float64_each_stream_says_what_it_says_alone(family, strategy):
    name, values = STRATEGIES[strategy]
    model = tiny.STREAMABLE[family]().double().cuda()
    agree(model, tiny.plan(model, name, 24, 2, **values), 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_so_it_does_through_the_fused_kernels(dtype, close, strategy):
    name, values = STRATEGIES[strategy]
    model = tiny.build("llama", initializer_range=0.05, **tiny.GROUPED).to("cuda", getattr(torch, dtype))
    agree(model, tiny.plan(model, name, 24, 2, **values), close)
