"""Kernels for one token's forward against plain torch: on CUDA, or, with TRITON_INTERPRET=1, on a processor."""

import os

import pytest
import tiny
import torch
from torch.nn import functional as F
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from sinkbench.attention.bands import band
from sinkbench.attention.kernels.ring import Ring, attend_plainly
from sinkbench.attention.scores import Scores
from sinkbench.positions.alibi import Alibi
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import LayerPlan, LayerSizes, Policy
from sinkbench.strategies.formats import Format

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else pytest.mark.cuda


@pytest.fixture
def single():
    pytest.importorskip("triton")
    from sinkbench.engines.single import norm, parts, pointwise, product, rotary

    return {"norm": norm, "parts": parts, "pointwise": pointwise, "product": product, "rotary": rotary}


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


def test_a_gated_block_is_that_of_torch(single):
    x, gate, up = some(1, 1, 1100), some(19, 1100) * 0.1, some(19, 1100) * 0.1
    for name, activation in single["parts"].ACTIVATIONS.items():
        wanted = activation(F.linear(x.flatten(), gate)) * F.linear(x.flatten(), up)
        assert apart(single["product"].gated(x, gate, up, name), wanted) < 1e-5


@pytest.mark.parametrize("kind", ["add", "mul", "silu", "gelu", "gelu_tanh", "relu"])
def test_what_stands_between_two_launches_is_that_of_torch(single, kind):
    x, y = some(1, 1, 1500), some(1, 1, 1500)
    wanted = {"add": x + y, "mul": x * y}.get(kind)
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


def ring(heads, capacity, dim, sinks, block, terms, gap):
    rope = Rope((10000.0 ** -(torch.arange(dim // 2).double() / (dim // 2))).to(DEVICE))
    turn = Rotation.still(rope, dim, torch.device(DEVICE)).by(rope, torch.tensor([-5], device=DEVICE))
    keys, values = torch.zeros(2, heads, capacity, dim, device=DEVICE)
    arrivals = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    counter = torch.zeros(1, dtype=torch.long, device=DEVICE)
    return Ring(keys, values, counter, sinks, turn, block, terms, gap, arrivals)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "capacity", "sinks", "block", "cap", "terms", "extra"),
    [
        (8, 8, 32, 40, 4, 1, 0.0, None, False),
        (9, 1, 16, 33, 4, 1, 0.0, None, True),
        (4, 2, 24, 65, 0, 32, 5.0, "rank", False),
        (4, 4, 16, 35, 3, 1, 0.0, "distance", True),
        (21, 1, 16, 35, 4, 8, 0.0, "rank", True),
    ],
)
def test_one_token_at_a_ring(single, heads, kv_heads, dim, capacity, sinks, block, cap, terms, extra):
    from sinkbench.attention.kernels import one_token

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
    assert not ours.arrivals.any()


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
    assert torch.equal(nll(apart_in_memory, labels), nll(logits, labels))


def test_the_nll_of_logits_that_are_no_numbers_is_none_and_of_what_is_excluded_infinite():
    pytest.importorskip("triton")
    from sinkbench.engines.nll import nll

    logits = some(4, 100)
    logits[0, 5:], logits[1, 3], logits[2, 7], logits[3] = -torch.inf, torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([2, 7, 8, 1], device=DEVICE)
    wanted = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(nll(logits, labels), wanted, equal_nan=True)
    assert nll(logits[:1], torch.tensor([50], device=DEVICE)).item() == torch.inf
