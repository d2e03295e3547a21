"""Kernels for one token's forward against plain torch: on CUDA, or, with TRITON_INTERPRET=1, on a processor."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch
from kernels import DEVICE, INTERPRETED, where_kernels_run
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from sinkbench.attention.bands import band
from sinkbench.attention.kernels.angles import Angles, Layout
from sinkbench.attention.kernels.ring import Ring, attend_plainly
from sinkbench.attention.scores import Scores
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import StripLayer
from sinkbench.engines.replay import CapturedStream
from sinkbench.engines.stepwise import Stepwise
from sinkbench.engines.turns import turns_of
from sinkbench.positions.alibi import Alibi
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import LayerPlan, LayerSizes, Policy
from sinkbench.strategies.formats import Format

pytestmark = where_kernels_run


@pytest.fixture
def single():
    pytest.importorskip("triton")
    from sinkbench.engines.single import (
        chosen,
        cosines,
        ends,
        experts,
        gates,
        norm,
        parts,
        pending,
        pointwise,
        product,
        rotary,
        router,
        sums,
    )

    modules = chosen, cosines, ends, experts, gates, norm, parts, pending, pointwise, product, rotary, router, sums
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def apart(ours, wanted):
    return float((ours - wanted).abs().max()) / float(wanted.abs().max())


def some(*shape):
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize("depth", [96, 1100, 2048, 4544])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_matrices_that_meet_one_vector_are_multiplied_together(single, depth, biased, count):
    x, weights = some(1, 1, depth), [some(n, depth) for n in (37, 16, 5)][:count]
    biases = [some(len(w)) if biased else None for w in weights]
    got = single["product"].products(x, weights, biases)
    for ours, weight, bias in zip(got, weights, biases):
        assert apart(ours, F.linear(x.flatten(), weight, bias)) < 1e-5


@pytest.mark.parametrize("depth", [70, 2560, 4544, 6912, 14336, 18176])
@pytest.mark.parametrize(("size", "rows"), [(2, 1), (2, 2), (4, 1)])
def test_a_row_is_read_once_and_nothing_beside_it(single, depth, size, rows):
    """And no thread holds more of it than it has registers for."""
    shape = single["product"]._shape(depth, size, rows)
    end = 0
    for begin, count in shape["PIECES"]:
        assert begin == end
        end = begin + count * shape["WIDTH"]
    assert depth <= end < depth + shape["WIDTH"]
    assert rows * size * depth <= 32 * shape["num_warps"] * single["product"].HELD


def test_a_gated_block_is_that_of_torch(single):
    x, gate, up = some(1, 1, 1100), some(19, 1100) * 0.1, some(19, 1100) * 0.1
    for name, activation in single["parts"].ACTIVATIONS.items():
        wanted = activation(F.linear(x.flatten(), gate)) * F.linear(x.flatten(), up)
        assert apart(single["product"].gated(x, gate, up, name), wanted) < 1e-5


def experts_in(family, **sizes):
    """Those of a model's first layer, and how they are asked."""
    model = tiny.build(family, initializer_range=0.3, **sizes).to(DEVICE)
    model.set_experts_implementation("eager")
    return next(module for module in model.modules() if hasattr(module, "_apply_gate"))


EXPERTS = {
    "gpt_oss": {"hidden_size": 96, "intermediate_size": 72, "num_local_experts": 5},  # transposed, biased, interleaved
    "mixtral": {"hidden_size": 96, "intermediate_size": 72, "num_local_experts": 5},
    "qwen3_moe": {"hidden_size": 96, "moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 3},
}


def quick_experts(single, module):
    """A quicker forward for ``module``, and the gate that it was found to have."""
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)
    sent = single["experts"].experts_of(module, single["pending"].Pending())
    return sent, sent.args[1]


@torch.no_grad()
@pytest.mark.parametrize("family", EXPERTS)
def test_one_token_is_sent_to_its_experts_as_torch_would(single, family):
    module = experts_in(family, **EXPERTS[family])
    sent, gate = quick_experts(single, module)
    assert gate.kind == ("clamped" if family == "gpt_oss" else "silu")
    x, shares = some(1, 96), torch.tensor([[0.5, 0.3, 0.2]], device=DEVICE)
    for chosen in ([2, 0, 4], [4, 3, 1]):
        wanted = module(x, torch.tensor([chosen], device=DEVICE), shares)
        assert apart(sent(x, torch.tensor([chosen], device=DEVICE), shares), wanted) < 1e-5
    several = some(2, 96), torch.tensor([[0, 1], [3, 0]], device=DEVICE), torch.rand(2, 2, device=DEVICE)
    assert torch.equal(sent(*several), module(*several))


@torch.no_grad()
@pytest.mark.parametrize("family", EXPERTS)
def test_a_gate_that_nobody_knows_stands_between_the_products(single, family):
    module = experts_in(family, **EXPERTS[family])
    if family == "gpt_oss":
        object.__setattr__(module, "_apply_gate", lambda both: both[..., ::2].sin() * both[..., 1::2])
    else:
        object.__setattr__(module, "act_fn", torch.sin)
    sent, gate = quick_experts(single, module)
    assert gate is None
    asked = some(1, 96), torch.tensor([[2, 0, 4]], device=DEVICE), torch.tensor([[0.5, 0.3, 0.2]], device=DEVICE)
    assert apart(sent(*asked), module(*asked)) < 1e-5


GATES = [(kind, interleaved) for kind in ("silu", "gelu_tanh", "relu", "clamped") for interleaved in (False, True)]


@pytest.mark.parametrize(("kind", "interleaved"), GATES)
def test_a_gate_is_found_by_asking_it(single, kind, interleaved):
    limits = (1.702, 7.0) if kind == "clamped" else (None, None)
    gate = single["gates"].Gate(kind, interleaved, *(limit or 0.0 for limit in limits))
    assert single["gates"].gate_of(gate.plainly, 48, torch.device(DEVICE), *limits) == gate
    assert single["gates"].gate_of(lambda both: gate.plainly(both) * 2, 48, torch.device(DEVICE), *limits) is None


@pytest.mark.parametrize("limit", [10.0, 16.0, 100.0])
@pytest.mark.parametrize("width", [64, 1536])
def test_a_gate_within_limits_that_a_module_does_not_name_is_none_known_here(single, limit, width):
    def apply(both):
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    assert single["gates"].gate_of(apply, width, torch.device(DEVICE), None, limit) is None


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("kind", "interleaved"), [*GATES, (None, False)])
@pytest.mark.parametrize(("depth", "inner"), [(75, 37), (1100, 20)])
def test_a_first_product_is_gated_as_it_is_written(single, kind, interleaved, transposed, depth, inner):
    gate = single["gates"].Gate(kind, interleaved, 1.702, 2.0) if kind else None
    x, bias, experts = some(1, depth), some(5, 2 * inner), torch.tensor([3, 0, 4], device=DEVICE)
    weight = some(5, depth, 2 * inner) if transposed else some(5, 2 * inner, depth)
    for beside in (bias, None):
        got = single["chosen"].first(x, weight, beside, experts, transposed, gate)
        both = (x @ (weight if transposed else weight.mT)).squeeze(1) + (0 if beside is None else beside)
        assert apart(got, gate.plainly(both[experts]) if gate else both[experts]) < 1e-5


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(("depth", "width"), [(96, 64), (1100, 21), (9000, 3)])
def test_a_second_product_is_the_sum_of_its_parts_by_their_shares(single, transposed, depth, width):
    x, bias, experts = some(3, depth), some(5, width), torch.tensor([3, 0, 4], device=DEVICE)
    weight, shares = some(5, depth, width) if transposed else some(5, width, depth), some(3)
    (_, _, parts), _, told = single["chosen"]._tiling(depth, width, 3, 4, transposed, True)
    assert parts > 1 or depth < (1000 if transposed else 9000)
    assert (parts - 1) * told["SHARE"] < depth <= parts * told["SHARE"]
    for beside in (bias, None):
        found = (x[:, None] @ (weight if transposed else weight.mT)[experts]).squeeze(1)
        found = found + (0 if beside is None else beside[experts])
        got = single["chosen"].second(x, weight, beside, experts, shares, transposed)
        assert apart(got, (found * shares[:, None]).sum(0, keepdim=True)) < 1e-5
        assert torch.equal(got, single["chosen"].second(x, weight, beside, experts, shares, transposed))


@torch.no_grad()
@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
def test_experts_of_half_precision_round_where_torch_does(single, family, dtype):
    module = experts_in(family, **EXPERTS[family]).to(dtype)  # an interpreter cuts off what bfloat16 rounds
    sent, _ = quick_experts(single, module)
    x, experts = some(1, 96).to(dtype), torch.tensor([[2, 0, 4]], device=DEVICE)
    for shares in (torch.tensor([[0.5, 0.3, 0.2]], device=DEVICE, dtype=d) for d in {dtype, torch.float32}):
        if family != "gpt_oss" or shares.dtype == dtype:  # which multiplies in place
            assert apart(sent(x, experts, shares), module(x, experts, shares)) < 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_experts_that_compute_something_else_keep_their_own_way(single):
    module = experts_in("mixtral", **EXPERTS["mixtral"])
    own = module.forward
    object.__setattr__(module, "forward", lambda x, *args: own(x, *args) + 1)
    assert single["experts"].experts_of(module, single["pending"].Pending()) is None
    assert single["experts"].experts_of(torch.nn.Linear(3, 3), single["pending"].Pending()) is None


def router_in(family, dtype, **sizes):
    """That of a model's first layer."""
    model = tiny.build(family, **sizes).to(DEVICE, dtype)
    module = next(module for module in model.modules() if type(module).__name__.endswith("TopKRouter"))
    for parameter in module.parameters():
        parameter.normal_(0, 0.3)
    return module


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "normalised"), [*((f, True) for f in EXPERTS), ("qwen3_moe", False)])
def test_a_router_is_found_by_asking_it(single, family, normalised, dtype):
    sizes = EXPERTS[family] | ({"norm_topk_prob": normalised} if family == "qwen3_moe" else {})
    module = router_in(family, dtype, **sizes)
    route = single["router"].router_of(module, single["pending"].Pending())
    assert route.args[1].of_all is not normalised
    for _ in range(5):
        x = some(1, 96).to(dtype)
        logits, shares, experts = route(x)
        plain, wanted, _ = module(x)
        assert apart(logits, plain) < 4 * torch.finfo(dtype).eps
        assert (shares.dtype, shares.shape) == (wanted.dtype, wanted.shape)
        found, others = route.args[1].plainly(logits)
        assert apart(shares, found) < 4 * torch.finfo(shares.dtype).eps
        assert torch.equal(logits.gather(-1, experts), logits.gather(-1, others))
    several = some(2, 96).to(dtype)
    assert all(torch.equal(*pair) for pair in zip(route(several), module(several)))


def test_equals_are_chosen_in_their_order_and_what_is_no_number_first(single):
    by = single["router"].Shares(4, False, torch.float32)
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, -torch.inf, 2.0, 1.0]], device=DEVICE)
    shares, experts = single["router"].shared(logits, by)
    assert experts.tolist() == [[1, 3, 5, 0]]
    assert apart(shares, logits[:, experts[0]].softmax(-1)) < 1e-6
    logits[0, 6], logits[0, 0] = torch.nan, torch.nan
    assert single["router"].shared(logits, by)[1].tolist() == [[0, 6, 1, 3]]
    for same in (-torch.inf, torch.nan, 0.0):
        assert single["router"].shared(torch.full_like(logits, same), by)[1].tolist() == [[0, 1, 2, 3]]


@torch.no_grad()
def test_a_router_that_chooses_in_another_way_keeps_its_own(single):
    module = router_in("mixtral", torch.float32, **EXPERTS["mixtral"])
    own = module.forward
    for other in (lambda x: own(-x), lambda x: (own(x)[0], own(x)[1] * 2, own(x)[2]), lambda x: own(x)[0]):
        object.__setattr__(module, "forward", other)
        assert single["router"].router_of(module, single["pending"].Pending()) is None
    assert single["router"].router_of(torch.nn.Linear(3, 3), single["pending"].Pending()) is None
    corrected = router_in("mixtral", torch.float32, **EXPERTS["mixtral"])
    corrected.register_buffer("e_score_correction_bias", torch.zeros(5, device=DEVICE))
    assert single["router"].router_of(corrected, single["pending"].Pending()) is None


@pytest.mark.parametrize("kind", ["add", "mul", "times", "over", "tanh", "silu", "gelu", "gelu_tanh", "relu"])
def test_what_stands_between_two_launches_is_that_of_torch(single, kind):
    x, y = some(1, 1, 1500), 30.0 if kind in ("times", "over") else some(1, 1, 1500)
    wanted = {"add": x + y, "mul": x * y, "times": x * y, "over": x / y, "tanh": x.tanh()}.get(kind)
    wanted = single["parts"].ACTIVATIONS[kind](x) if wanted is None else wanted
    assert apart(single["pointwise"].combined(x, y, kind), wanted) < 1e-5


NORMS = {
    "rms": lambda: modeling_llama.LlamaRMSNorm(70),
    "from one": lambda: Gemma2RMSNorm(70),
    "layer": lambda: torch.nn.LayerNorm(70),
    "layer without bias": lambda: torch.nn.LayerNorm(70, bias=False),
    "centred without bias": lambda: modeling_cohere.CohereLayerNorm(70),
}


@pytest.mark.parametrize("kind", NORMS)
def test_what_a_norm_computes_is_found_by_asking_it(single, kind):
    module = NORMS[kind]().to(DEVICE)
    for weight in module.parameters():
        weight.data.normal_()
    found, x = single["norm"].norm_of(module), some(1, 3, 70)
    assert found is not None
    assert apart(found(x), module(x)) < 1e-5


def test_what_is_no_such_norm_is_left_alone(single):
    assert single["norm"].norm_of(modeling_cohere.CohereLayerNorm((4, 16)).to(DEVICE)) is None
    assert single["norm"].norm_of(torch.nn.GroupNorm(2, 70).to(DEVICE)) is None


ROTARY = {
    "llama": (modeling_llama.apply_rotary_pos_emb, 16, lambda x: torch.cat((x, x))),
    "cohere": (modeling_cohere.apply_rotary_pos_emb, 16, lambda x: x.repeat_interleave(2)),
    "glm": (modeling_glm.apply_rotary_pos_emb, 8, lambda x: torch.cat((x, x))),
    "gpt_oss": (modeling_gpt_oss.apply_rotary_pos_emb, 16, lambda x: x),
}


@pytest.mark.parametrize("family", ROTARY)
def test_how_a_rotary_function_lies_is_found_by_asking_it(single, family):
    function, turning, spread = ROTARY[family]
    angles = torch.rand(turning // 2, device=DEVICE)
    cos, sin = (spread(f)[None, None] for f in (angles.cos(), angles.sin()))
    query, key = some(1, 4, 1, 16), some(1, 1, 2, 16).transpose(1, 2)
    turn = single["rotary"].Turn(function)
    for ours, wanted in zip(turn(query, key, cos, sin), function(query, key, cos, sin)):
        assert apart(ours, wanted) < 1e-6
    assert None not in turn.layouts.values()


def test_a_rotary_function_of_one_tensor_is_asked_in_its_own_order(single):
    heads, (sin, cos) = some(1, 1, 4, 16)[..., :8], some(2, 1, 1, 4)
    turn = single["rotary"].Turn(modeling_gptj.apply_rotary_pos_emb)
    assert apart(turn(heads, sin, cos), modeling_gptj.apply_rotary_pos_emb(heads, sin, cos)) < 1e-6
    assert None not in turn.layouts.values()


class Launches(TorchDispatchMode):
    """Notes the operations of torch's that look at more than one number."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace == "aten" and func.overloadpacket not in ALLOCATE:
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


ALLOCATE = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten._unsafe_view)


@pytest.fixture
def overlapping(single):
    """Runs a function as a part of a captured step, and says what torch launched for it."""

    def run(function, model=None):
        parts = single["parts"].Parts(model or torch.nn.Module())
        position = torch.zeros(1, dtype=torch.long, device=DEVICE)
        with Launches() as launches, parts.overlapping(position), unseen():
            out = function(parts) if model is None else function(parts, position)
        return out, launches.made

    return run


class NoKernels:
    """No kernel is there yet, whichever is asked for."""

    def asks(self, program, *args, **told):
        return True


@pytest.mark.parametrize("key_heads", [1, 2])  # one head is a vector, whose sums and products are launches of ours
def test_what_a_rotary_function_is_found_to_be_does_not_hang_on_which_kernels_are_there(overlapping, single, key_heads):
    from sinkbench.attention.kernels import ahead

    cos, sin = some(2, 1, 1, 64)
    turn = single["rotary"].Turn(modeling_llama.apply_rotary_pos_emb)

    def asked(parts):
        turn.pending = parts.pending
        with ahead._by(NoKernels()):
            turn(some(1, 4, 1, 64), some(1, key_heads, 1, 64), cos, sin)

    overlapping(asked)
    assert list(turn.layouts.values()) == [Layout(False, False, False)]


@contextmanager
def unseen():
    """An interpreter of Triton copies what a launch works on, by operations of torch's that are no part of a step."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    own = GridExecutor.__call__

    def call(*args, **kwargs):
        with _disable_current_modes():
            return own(*args, **kwargs)

    GridExecutor.__call__ = call
    try:
        yield
    finally:
        GridExecutor.__call__ = own


SUMS = {
    "x + y": lambda x, y, z, m, n: x + y,
    "x + y + z": lambda x, y, z, m, n: x + y + z,
    "n(x + y)": lambda x, y, z, m, n: n(x + y),
    "n(z + (x + y))": lambda x, y, z, m, n: n(z + (x + y)),
    "n(z + m(x))": lambda x, y, z, m, n: n(z + m(x)),
    "z + m(x)": lambda x, y, z, m, n: z + m(x),
    "n(x + y) + (x + y)": lambda x, y, z, m, n: n(s := x + y) + s,
    "m(x) * (x + y)": lambda x, y, z, m, n: m(x) * (x + y),
    "gelu(x + y)": lambda x, y, z, m, n: F.gelu(x + y),
    "x += y": lambda x, y, z, m, n: (s := x + z, x.add_(y), s + x)[2],
}


@pytest.mark.parametrize("form", SUMS)
def test_sums_and_norms_that_wait_for_each_other_are_those_of_torch(single, overlapping, form):
    vectors = [some(1, 1, 70) for _ in range(3)]
    norms = [kind().to(DEVICE) for kind in (lambda: torch.nn.LayerNorm(70), lambda: Gemma2RMSNorm(70))]
    for weight in (w for module in norms for w in module.parameters()):
        weight.data.normal_()
    with torch.no_grad():
        wanted = SUMS[form](*(x.clone() for x in vectors), *norms)

        def ours(parts):
            quick = [single["norm"].norm_of(module) for module in norms]
            calls = [partial(single["sums"].normalised, norm=norm, pending=parts.pending) for norm in quick]
            out = SUMS[form](*vectors, *calls)
            parts.pending.settle(out)
            return out

        got, _ = overlapping(ours)
    assert apart(got, wanted) < 1e-5


@pytest.mark.parametrize("pairing", ["half", "interleaved", "whole"])
def test_a_slice_of_each_head_that_turns_and_is_joined_to_the_rest_is_a_turn_of_the_whole(single, overlapping, pairing):
    """And none at all, where an attention does it."""
    turning = 16 if pairing == "whole" else 8
    angles = torch.rand(turning // 2, device=DEVICE)
    function = modeling_llama.apply_rotary_pos_emb if pairing == "half" else modeling_cohere.apply_rotary_pos_emb
    spread = torch.cat((angles, angles)) if pairing == "half" else angles.repeat_interleave(2)
    cos, sin = spread.cos()[None, None], spread.sin()[None, None]
    states = [some(1, 1, heads, 16).transpose(1, 2) for heads in (4, 2)]
    rope = Rope(torch.ones(turning // 2), "half" if pairing == "half" else "interleaved")

    def heads(rotate):
        turned = rotate(*(x[..., :turning] for x in states), cos, sin)
        return [torch.cat((t, x[..., turning:]), dim=-1) for t, x in zip(turned, states, strict=True)]

    turn = single["rotary"].Turn(function)
    heads(turn)  # finds the layout

    def joined(parts):
        turn.pending = parts.pending
        out = heads(turn)
        return out, parts.unturned(*out, rope), [x.clone() for x in out]  # who reads them finds them turned

    (_, (*sources, found), read), launched = overlapping(joined)
    assert launched == ["aten.clone.default"] * 2
    assert found.of(rope)
    for source, state in zip(sources, states, strict=True):
        assert torch.equal(source, state[0, :, 0])
    for ours, wanted in zip(read, heads(function), strict=True):
        assert apart(ours, wanted) < 1e-6


def test_what_follows_from_buffers_and_the_position_alone_is_computed_once_a_step(overlapping):
    model = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
    for module in model:
        module.register_buffer("table", torch.arange(12.0, device=DEVICE).view(6, 2))
    other = torch.nn.Module()
    other.register_buffer("table", torch.ones(6, 2, device=DEVICE))
    model.append(other)
    x = some(2)

    def answers(parts, at):
        return [module.table[at] * 2 + x for module in model]

    got, launched = overlapping(answers, model)
    for ours, module in zip(got, model, strict=True):
        assert torch.equal(ours, module.table[:1] * 2 + x)
    assert launched.count("aten.index.Tensor") == 2
    assert launched.count("aten.add.Tensor") == 4


def test_an_activation_goes_along_with_the_product_that_it_is_of(single, overlapping):
    x, weight, bias = some(1, 1, 96), some(70, 96), some(70)

    def ours(parts):
        y = single["product"].promised(x, weight, bias, parts.pending)
        out = F.gelu(y)
        parts.pending.settle(out)
        waits = parts.pending.of(y) is not None
        return out, y.clone(), waits

    (out, before, waits), _ = overlapping(ours)
    assert waits  # nobody had asked for what the activation is of
    assert apart(out, F.gelu(F.linear(x, weight, bias))) < 1e-5
    assert apart(before, F.linear(x, weight, bias)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "llama3", "yarn", "stablelm", "cohere", "glm", "gpt_oss"])
def test_what_a_rotary_module_answers_is_found_by_asking_it(single, family):
    model = tiny.STREAMABLE[family]().to(DEVICE)
    found = [(m, single["cosines"].cosines_of(m)) for m in model.modules() if hasattr(m, "inv_freq")]
    assert found
    for module, cosines in found:
        assert cosines is not None
        for position in (0, 1, 60, 9000):
            at, x = torch.tensor([[position]], device=DEVICE), some(1, 1, 8)
            for ours, wanted in zip(cosines(x, at), module(x, at), strict=True):
                assert ours.shape == wanted.shape
                assert torch.allclose(ours, wanted, atol=1e-5)


def test_a_module_of_somebody_elses_finds_what_it_reads(single):
    """As its kernels may be launched by nobody that is seen."""

    class Elsewhere(torch.nn.Linear):
        def forward(self, x):
            with _disable_current_modes():  # as a kernel of its own would
                return x * 3

    model = torch.nn.ModuleList([torch.nn.LayerNorm(70), Elsewhere(70, 70)]).to(DEVICE)
    x, position = some(1, 1, 70), torch.zeros(1, dtype=torch.long, device=DEVICE)
    with torch.no_grad(), single["parts"].single_parts(model) as parts, parts.overlapping(position):
        got = model[1](model[0](x))
    assert apart(got, F.layer_norm(x, (70,)) * 3) < 1e-5


@pytest.mark.parametrize("count", [7, 4096, 9000])
def test_a_step_ends_with_its_loss_and_moves_on(single, count):
    logits, tokens = some(count) * 5, torch.tensor([3, 1, 6, 2], device=DEVICE)
    counter, position = torch.tensor([1], device=DEVICE), torch.tensor([10], device=DEVICE)
    nll, arrivals = torch.zeros((), device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    end = single["ends"].End(tokens, counter, position, nll, arrivals)
    for label in (6, 2):
        end(logits)
        assert float(nll) == pytest.approx(
            float(F.cross_entropy(logits[None], torch.tensor([label]).to(DEVICE))), abs=1e-5
        )
    assert (int(counter), int(position), int(arrivals)) == (3, 12, 0)


@pytest.mark.parametrize("strategy", ["attention_sinks", "context_shift", "pyramid"])
@pytest.mark.parametrize("positions", ["cache", "text"])
def test_a_step_begins_with_the_rotations_of_its_query(single, strategy, positions):
    model = tiny.STREAMABLE["gptj"]().to(DEVICE)
    plan = tiny.plan(model, strategy, 24, 4, positions, **({"beta": 2} if strategy == "pyramid" else {}))
    layers = [layer for layer in StreamCache(model, plan).kept if isinstance(layer, StripLayer)]
    ours, wanted = (turns_of(layers, torch.device(DEVICE), torch.float32) for _ in range(2))
    for mine, plain in zip(ours, wanted, strict=True):
        ways = single["ends"].Ways(mine)
        for now in (0, 23, 24, 25, 60, 1000):
            token, position = (torch.tensor([n], device=DEVICE) for n in (now, now + 7))
            ways.set(token, position)
            plain.set(token, position)
            assert apart(mine.rotation.cos, plain.rotation.cos) < 1e-6
            assert torch.allclose(mine.rotation.sin, plain.rotation.sin, atol=1e-6)


def ring(heads, capacity, dim, sinks, block, terms, gap):
    rope = Rope((10000.0 ** -(torch.arange(dim // 2).double() / (dim // 2))).to(DEVICE))
    turn = Rotation.still(rope, dim, torch.device(DEVICE)).by(rope, torch.tensor([-5], device=DEVICE))
    keys, values = torch.zeros(2, heads, capacity, dim, device=DEVICE)
    counter = torch.zeros(1, dtype=torch.long, device=DEVICE)
    return Ring(keys, values, counter, sinks, turn, block, terms, gap)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "capacity", "sinks", "block", "cap", "terms", "extra"),
    [
        (8, 8, 32, 40, 4, 1, 0.0, None, False),
        (9, 1, 16, 33, 4, 1, 0.0, None, True),
        (4, 2, 24, 65, 0, 32, 5.0, "rank", False),
        (4, 4, 16, 35, 3, 1, 0.0, "distance", True),
        (21, 1, 16, 35, 4, 8, 0.0, "rank", True),
        (2, 1, 80, 103, 35, 1, 0.0, None, True),
        (2, 2, 20, 75, 34, 8, 0.0, "rank", False),
    ],
)
@pytest.mark.parametrize("joined", [128, 2])
def test_one_token_at_a_ring(
    single, heads, kv_heads, dim, capacity, sinks, block, cap, terms, extra, joined, monkeypatch
):
    from sinkbench.attention.kernels import one_token

    monkeypatch.setattr(one_token, "JOINED", joined)
    table = {"rank": some(heads, capacity), "distance": some(heads, 1) * 0.1}.get(terms)
    ours, plain = (ring(kv_heads, capacity, dim, sinks, block, table, terms == "distance") for _ in range(2))
    logit = some(heads) if extra else None
    for _ in range(2 * capacity + 5):
        query, (key, value) = some(heads, dim), some(2, kv_heads, dim)
        got = one_token.attend(ours, 0.2, query, key, value, cap, logit)
        assert apart(got, attend_plainly(plain, 0.2, query, key, value, cap, logit)) < 1e-5
        ours.counter += 1
        plain.counter += 1
    assert torch.equal(ours.keys, plain.keys)


@pytest.mark.parametrize(("pairing", "turning"), [("half", 16), ("half", 8), ("interleaved", 8)])
def test_one_token_whose_heads_have_yet_to_turn(single, pairing, turning):
    from sinkbench.attention.kernels import one_token

    rope = Rope((10000.0 ** -(torch.arange(turning // 2).double() / 8)).to(DEVICE), pairing)
    still = Rotation.still(rope, 16, torch.device(DEVICE)).by(rope, torch.tensor([-5], device=DEVICE))
    ours, plain = (ring(2, 11, 16, 3, 1, None, False) for _ in range(2))
    ours.rotation = plain.rotation = still
    for t in range(25):
        angle = rope.inv_freq.float() * t
        spread = torch.cat((angle, angle)) if pairing == "half" else angle.repeat_interleave(2)
        angles = Angles(spread.cos(), spread.sin(), Layout(pairing == "interleaved", False, False))
        fused = some(8, 16)  # of queries, keys and values, one behind the other
        query, key, value = fused[:4], fused[4:8:2], fused[5:8:2]
        turned = (rope.move(x, torch.full((len(x),), t, device=DEVICE)) for x in (query, key))
        got = one_token.attend(ours, 0.2, query, key, value, 0.0, None, angles)
        assert apart(got, attend_plainly(plain, 0.2, *turned, value, 0.0, None)) < 1e-5
        ours.counter += 1
        plain.counter += 1
    assert apart(ours.keys, plain.keys) < 1e-6


class Uncaptured(CapturedStream):
    """Runs a step where the real one replays it, and notes what torch launches for it."""

    def capture(self):
        for _ in range(2):
            self._step()
            self._stand()
            self.parts.learnt()
        with Launches() as launches:
            self._step()
        self._stand()
        self.launched = launches.made
        self.graph = SimpleNamespace(replay=self._step)


def after(stream):
    """The loss of one more step."""
    stream.launch()
    return stream.ended()[0]


FAMILIES = ("stablelm", "gptj", "gptj-whole-head", "gemma2", "gpt_neox", "phi", "mpt", "glm", "gpt_oss")


@torch.no_grad()
@pytest.mark.parametrize(
    "family", [f if f in FAMILIES[:2] else pytest.param(f, marks=pytest.mark.heavy) for f in FAMILIES]
)
def test_no_launch_of_torch_stands_between_two_layers(single, family):
    made = []
    for count in (2, 3):
        kinds = {"layer_types": ["sliding_attention"] * count} if family in ("gemma2", "gpt_oss") else {}
        layers = {"n_layers": count} if family == "mpt" else {"num_hidden_layers": count}
        model = tiny.STREAMABLE[family](**layers, **kinds).to(DEVICE)
        stream = Uncaptured(model, tiny.plan(model, "attention_sinks", 5, 2), tiny.tokens(7), True)
        with unseen(), stream:
            assert stream.prepared() is None
            nll = [after(stream) for _ in range(6 if count == 2 else 0)]
        made.append(stream.launched)
        if nll:
            plan = tiny.plan(model, "attention_sinks", 5, 2)
            wanted = [step.nll[0] for step in Stepwise(model).run(plan, tiny.tokens(7))]
            assert nll == pytest.approx(wanted, abs=1e-3)
    assert made[0] == made[1]


LINE = torch.tensor([0.5, 0.25, 0.125, 0.3, 0.2, 0.1])[:, None]
TERMS = {
    "none": None,
    "linear": Alibi(lambda n: (torch.arange(n).float() * LINE).to(DEVICE)),
    "rounded": Alibi(lambda n: (torch.arange(n).float() * LINE).bfloat16().float().to(DEVICE)),
}


@pytest.mark.parametrize(("first", "begin", "n", "recent", "block"), [(0, 4, 100, 60, 1), (300, 244, 120, 60, 30)])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("cap", "positions"), [(None, "cache"), (3.0, "text")])
def test_a_band_whose_scores_are_more_than_products(single, first, begin, n, recent, block, terms, cap, positions):
    from sinkbench.attention.kernels import band as kernel

    query, pair = some(2, 6, n, 16), some(2, 2, 2, first + n - begin, 16)
    plan = LayerPlan(Policy(4 + recent, 4, block), positions, Format(), LayerSizes("full", 2, 16))
    scores = Scores(0.25, cap, TERMS[terms])
    for ours, wanted in zip(
        kernel.attend(query, *pair, first, begin, plan, scores), band(query, *pair, first, begin, plan, scores)
    ):
        blind = max(0, begin - first)
        assert apart(ours[:, :, blind:], wanted[:, :, blind:]) < 1e-4


def test_activations_are_known_by_what_they_compute(single):
    known = {
        activation
        for family in ("llama", "gptj", "mpt", "gemma2")
        for module in tiny.shared(family).modules()
        if type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation")
        for activation in [single["parts"].activation_of(module, torch.device("cpu"))]
    }
    assert known == {"silu", "gelu_tanh", "gelu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 70_001), (1, 49), (300, 3000), (7, 5000)])
def test_the_nll_is_that_of_torch(dtype, rows, vocabulary):
    pytest.importorskip("triton")
    from sinkbench.engines.nll import nll

    torch.manual_seed(0)
    logits, labels = (5 * some(rows, vocabulary)).to(dtype), torch.randint(0, vocabulary, (rows,), device=DEVICE)
    wanted = F.cross_entropy(logits.double(), labels, reduction="none")
    assert (nll(logits, labels) - wanted).abs().max() < 1e-5
    apart_in_memory = torch.stack([logits, logits], dim=1)[:, 0]
    assert (nll(apart_in_memory, labels) - wanted).abs().max() < 1e-5


def test_the_nll_of_logits_that_are_no_numbers_is_none_and_of_what_is_excluded_infinite():
    pytest.importorskip("triton")
    from sinkbench.engines.nll import nll

    logits = some(4, 100)
    logits[0, 5:], logits[1, 3], logits[2, 7], logits[3] = -torch.inf, torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([2, 7, 8, 1], device=DEVICE)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(nll(logits, labels), wanted, equal_nan=True)
    assert nll(logits[:1], torch.tensor([50], device=DEVICE)).item() == torch.inf
