"""What differs on CUDA: copies that go through a file, offloaded weights, the model moved, streams of threads."""

import copy
import io

import accelerate
import pytest
import tiny
import torch
from dropin import GREEDY, SIZES, benchmark, nlls

from sinkbench import attention_sinks
from sinkbench.errors import UserError

pytestmark = pytest.mark.cuda

ASKED = {"max_new_tokens": 8, **GREEDY}
families = pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "mpt", "qwen3_next"])


@families
def test_copies_and_pickled_caches_go_on(family):
    model, stream = tiny.STREAMABLE[family]().cuda(), tiny.tokens(80).cuda()[None]
    with attention_sinks(model, **SIZES), torch.no_grad():
        past, file = model(stream[:, :50]).past_key_values, io.BytesIO()
        torch.save(past, file)
        file.seek(0)
        twins = [copy.deepcopy(past), torch.load(file, weights_only=False)]
        wanted = model(stream[:, 50:], past_key_values=past).logits
        for twin in twins:
            assert (model(stream[:, 50:], past_key_values=twin).logits - wanted).abs().max() < 1e-4
        file.seek(0)
        elsewhere = torch.load(file, weights_only=False, map_location="cuda")
    with pytest.raises(UserError, match="lies on cuda"):
        elsewhere.attach(tiny.STREAMABLE[family]())


@families
def test_a_model_that_moves_is_read_again(family):
    model, stream = tiny.STREAMABLE[family](), tiny.tokens(60)
    with attention_sinks(model, **SIZES):
        here = nlls(model, stream)
        model.cuda()
        there = nlls(model, stream.cuda()).cpu()
    assert (here - there).abs().max() < 1e-3
    assert (here - benchmark(model.cpu(), stream)).abs().max() < 1e-3


@families
def test_weights_that_are_offloaded_from_cuda(family):
    model, prompt = tiny.STREAMABLE[family](), tiny.tokens(60).cuda()[None]
    with attention_sinks(model.cuda(), **SIZES):
        wanted = model.generate(prompt, **ASKED)
    accelerate.cpu_offload(model.cpu(), execution_device="cuda:0")
    with attention_sinks(model, **SIZES):
        assert torch.equal(model.generate(prompt, **ASKED), wanted)
