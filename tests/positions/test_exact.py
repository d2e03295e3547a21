"""Rotary angles are exact, and forming them disturbs no measurement."""

import pytest
import tiny
import torch

from sinkbench.cache.stream import StreamCache
from sinkbench.engines.forward import feeding
from sinkbench.positions.exact import exact_angles

FAMILIES = ("llama", "gpt_neox", "glm", "yarn", "gemma3", "phi3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_reads_nothing_back_from_the_device_for_them(family, monkeypatch):
    model = tiny.shared(family)
    cache = StreamCache(model, tiny.plan(model, "attention_sinks"))
    feed = feeding(model, cache)
    with torch.inference_mode(), exact_angles(model):
        for name in ("__float__", "__bool__", "__int__", "item", "tolist"):
            read = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, lambda self, read=read, name=name: caught(self, read, name))
        reads = []

        def caught(tensor, read, name):
            reads.append(name)
            return read(tensor)

        feed(tiny.tokens(1))
    assert reads == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_those_of_float64(dtype):
    model = tiny.STREAMABLE["llama"]().to(dtype)
    rotary, positions = model.model.rotary_emb, torch.tensor([[10**6]])
    x = torch.zeros(1, 1, 1, dtype=dtype)
    rough = rotary(x, positions)[0]
    with exact_angles(model):
        cos = rotary(x, positions)[0]
    wanted = (10**6 * rotary.inv_freq.double()).cos().repeat(2)
    assert torch.allclose(cos[0, 0].double(), wanted, atol=1e-7 if dtype == torch.float32 else 1e-12)
    assert not torch.allclose(rough[0, 0].double(), wanted, atol=1e-4)
    assert torch.equal(rotary(x, positions)[0], rough)  # nothing is left behind
