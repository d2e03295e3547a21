"""Programs for the parts of a forward of many tokens, against plain torch: on CUDA, or interpreted on a processor."""

from contextlib import nullcontext

import pytest
import tiny
import torch
from kernels import DEVICE, HALF, where_kernels_run
from torch import nn
from torch.nn import functional as F
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from sinkbench import compilers
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import lay
from sinkbench.engines.chunks import hidden_states

pytestmark = where_kernels_run
FAMILIES = [family for family in tiny.STREAMABLE if family != "qwen3_next"]  # which carries a state


@pytest.fixture
def many():
    pytest.importorskip("triton")
    from sinkbench.engines.many import gate, later, norm, parts, rotary

    return {module.__name__.rpartition(".")[2]: module for module in (gate, later, norm, parts, rotary)}


def some(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def apart(ours, wanted):
    ours, wanted = ours.double(), wanted.double()
    return float((ours - wanted).abs().max()) / float(wanted.abs().max())


@torch.inference_mode()
def read(model, within):
    """Hidden states of two streams, the one shorter, in two chunks."""
    cache = StreamCache(model, tiny.plan(model, "attention_sinks", 12, 2))
    streams = [tiny.tokens(22), tiny.tokens(19, 1)]
    with within:
        return torch.cat([hidden.flatten().clone() for _, hidden in hidden_states(model, cache, streams, 13)])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_gives_the_hidden_states_of_the_plain_one(many, family):
    """In half precision it is as near to those of float32 as the plain one."""
    model = tiny.STREAMABLE[family](initializer_range=0.05).to(DEVICE)
    wanted = read(model, nullcontext())
    assert apart(read(model, many["parts"].many_parts(model)), wanted) <= 1e-5
    model = model.to(HALF)
    plain, ours = (read(model, within) for within in (nullcontext(), many["parts"].many_parts(model)))
    off = [float((x.double() - wanted).square().mean().sqrt()) for x in (ours, plain)]
    assert off[0] <= 1.25 * off[1]
    assert float((ours.double() - plain).square().mean().sqrt()) <= 1.5 * off[1]


USED = {
    "llama": {"sums": 4, "norms": 1, "gates": 2, "turns": 2, "turns into caches": 2},
    "phi3": {"sums": 4, "norms": 1, "gates": 2, "turns": 2, "turns into caches": 2},
    "gemma": {"sums": 4, "norms": 1, "gates": 2, "turns": 2, "turns into caches": 2},
    "falcon": {"sums": 2, "norms": 1, "gates": 0, "turns": 2, "turns into caches": 2},
    "gptj": {"sums": 2, "norms": 1, "gates": 0, "turns": 4, "turns into caches": 0},
    "mpt": {"sums": 4, "norms": 1, "gates": 0, "turns": 0, "turns into caches": 0},
    "cohere": {"sums": 2, "norms": 1, "gates": 2, "turns": 2, "turns into caches": 2},
}


@pytest.mark.parametrize("family", USED)
def test_sums_with_norms_gates_and_rotations_are_one_launch_each(many, family, monkeypatch):
    launched = dict.fromkeys(("sums", "norms", "gates", "turns", "turns into caches"), 0)

    def counted(module, name, what):
        own = getattr(many[module], name)

        def launch(*args):
            launched[what(args)] += 1
            return own(*args)

        monkeypatch.setattr(many[module], name, launch)

    counted("parts", "normalise", lambda args: "norms" if args[1] is None else "sums")
    counted("later", "gate", lambda args: "gates")
    counted("rotary", "turn", lambda args: "turns" if len(args) == 4 else "turns into caches")
    model = tiny.STREAMABLE[family]().to(DEVICE)
    cache = StreamCache(model, tiny.plan(model, "windowed"))
    with torch.inference_mode(), many["parts"].many_parts(model):
        list(hidden_states(model, cache, [tiny.tokens(9)]))
    assert launched == USED[family]


def test_nothing_stays_replaced_afterwards(many):
    model, before = tiny.STREAMABLE["llama"]().to(DEVICE), modeling_llama.apply_rotary_pos_emb
    with many["parts"].many_parts(model):
        assert modeling_llama.apply_rotary_pos_emb is not before
    assert modeling_llama.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())


NORMS = {
    "rms": modeling_llama.LlamaRMSNorm,
    "from one": Gemma2RMSNorm,
    "layer": nn.LayerNorm,
    "layer without bias": lambda n: nn.LayerNorm(n, bias=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 70, 576, 4544])
@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_and_the_sum_before_it_are_those_of_torch(many, kind, width, dtype):
    module = NORMS[kind](width).to(DEVICE, dtype)
    for weight in module.parameters():
        weight.data.normal_()
    norm, x, y = many["parts"].Known().norm(module), some(2, 3, width, dtype=dtype), some(2, 3, width, dtype=dtype)
    close = 4 * torch.finfo(dtype).eps
    with torch.inference_mode():
        alone, both = many["norm"].normalise(x, None, norm), many["norm"].normalise(x, y, norm)
        assert apart(alone.out, module(x)) <= close
        assert apart(both.value, x + y) <= close
        assert apart(both.out, module(x + y)) <= close


def test_norms_that_are_alike_have_their_own_weights(many):
    known, modules = many["parts"].Known(), [nn.LayerNorm(16).to(DEVICE) for _ in range(2)]
    for module in modules:
        module.weight.data.normal_()
    assert [known.norm(module).weight is module.weight for module in modules] == [True, True]
    assert len(known.norms) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gate_is_that_of_torch_wherever_its_rows_lie(many, name, dtype):
    activation = many["later"].ACTIVATIONS[name]
    halves = some(2, 3, 5000, dtype=dtype).chunk(2, dim=-1)
    for x, y in (halves, [half.contiguous() for half in halves], [half.transpose(1, 2) for half in halves]):
        wanted = activation(x.float()) * y.float()
        assert apart(many["gate"].gate(x, y, name), wanted) <= 2 * torch.finfo(dtype).eps


ROTARY = {
    "llama": (modeling_llama.apply_rotary_pos_emb, 16, lambda x: torch.cat((x, x), dim=-1)),
    "cohere": (modeling_cohere.apply_rotary_pos_emb, 16, lambda x: x.repeat_interleave(2, dim=-1)),
    "glm": (modeling_glm.apply_rotary_pos_emb, 8, lambda x: torch.cat((x, x), dim=-1)),
    "gpt_oss": (modeling_gpt_oss.apply_rotary_pos_emb, 24, lambda x: x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("family", ROTARY)
def test_a_rotary_function_is_that_of_the_model(many, family, streams, dtype):
    function, turning, spread = ROTARY[family]
    width = 24 if family in ("glm", "gpt_oss") else 16
    angles = spread(torch.rand(streams, 5, turning // 2, device=DEVICE))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    query, key = some(2, 5, 9, width, dtype=dtype).transpose(1, 2), some(2, 5, 2 * width, dtype=dtype)
    key = key.view(2, 5, 2, width).transpose(1, 2)
    found = many["rotary"].Turn().of(function, (query, key, cos, sin))
    for ours, wanted in zip(found, function(query, key, cos, sin), strict=True):
        turned, strip = ours.keep(), torch.zeros(2, wanted.shape[1], 11, width, dtype=dtype, device=DEVICE)
        assert apart(turned, wanted) <= 3 * torch.finfo(dtype).eps
        assert turned.transpose(1, 2).is_contiguous()  # as attention reads it
        lay(strip[:, :, 3:8], many["later"].Later.of(ours))
        assert torch.equal(strip[:, :, 3:8], turned)
        assert not strip[:, :, :3].any() and not strip[:, :, 8:].any()


def test_a_rotary_function_of_one_tensor_is_asked_in_its_own_order(many):
    heads, (sin, cos) = some(2, 5, 4, 16)[..., :8], some(2, 2, 5, 4)
    function = modeling_gptj.apply_rotary_pos_emb
    (found,) = many["rotary"].Turn().of(function, (heads, sin, cos))
    assert apart(found.keep(), function(heads, sin, cos)) < 1e-6


def test_a_rotary_function_of_another_kind_keeps_its_own_way(many):
    query, cos = some(1, 2, 5, 16), some(1, 5, 16)
    assert many["rotary"].Turn().of(lambda q, k, cos, sin: (q.flip(-1), k), (query, query, cos, cos)) is None


READ = {
    "product": lambda s: F.linear(s, torch.eye(8, device=DEVICE)),
    "method": lambda s: s.reshape(-1),
    "index": lambda s: s[:, 1:],
    "list": lambda s: torch.cat([s, s], dim=-1),
    "of another sum": lambda s: (s + 1.0) + s,
    "with a number": lambda s: s * 2.0,
    "in place": lambda s: s.add_(1.0) + s,
    "out": lambda s: torch.empty(1, 2, 8, device=DEVICE).copy_(s),
    "numbers": lambda s: torch.tensor(s.tolist(), device=DEVICE),
    "dropout": lambda s: F.dropout(s, 0.5, training=False),
}


@pytest.mark.parametrize("way", READ)
def test_what_is_promised_is_there_however_it_is_read(many, way):
    later = many["later"]
    x, y, other = some(1, 2, 8), some(1, 2, 8), torch.ones(1, 2, 8, device=DEVICE)
    for promise, wanted in ((later.Sum(x, y), x + y), (later.Activated(x, "silu"), F.silu(x))):
        promised = later.Later.of(promise)
        assert (promised.shape, promised.dtype, promised.device) == (x.shape, x.dtype, x.device)
        assert promised.promise is promise  # as nothing was read
        assert torch.allclose(later.settled(READ[way](promised)), READ[way](wanted.clone()))
        assert torch.allclose(later.settled(later.Later.of(promise) * other), wanted)


def test_a_program_that_does_not_compile_is_done_without_and_said_once(many, monkeypatch):
    class CompilationError(Exception):
        __module__ = "triton.compiler.errors"

    def refuse(*args):
        raise CompilationError("no such instruction")

    monkeypatch.setattr(many["parts"], "normalise", refuse)
    monkeypatch.setattr(compilers, "REFUSED", set())
    model = tiny.STREAMABLE["llama"](initializer_range=0.05).to(DEVICE)
    wanted = read(model, nullcontext())
    with pytest.warns(UserWarning, match="no such instruction") as lines:
        got = read(model, many["parts"].many_parts(model))
    assert len(lines) == 1
    assert apart(got, wanted) <= 1e-5
