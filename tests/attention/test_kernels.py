"""What the rings and the turns compute, on any device; the CUDA kernels against plain torch."""

import pytest
import torch
from kernels import DEVICE, INTERPRETED

from sinkbench.attention.bands import band
from sinkbench.attention.kernels.fold import fold_sinks
from sinkbench.attention.kernels.ring import Ring, attend_plainly, attend_ring
from sinkbench.attention.scores import Scores, fold, softmax
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import LayerPlan, LayerSizes, Policy
from sinkbench.strategies.formats import Format

cuda = pytest.mark.cuda


def apart(ours, wanted):
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


def rope(pairs, pairing):
    return Rope(10000.0 ** -(torch.arange(pairs).double() / pairs), pairing)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("pairs", [3, 8])
def test_a_turn_is_the_rotation_whatever_the_pairing_and_the_share_that_rotates(pairing, pairs):
    query, by = torch.randn(2, 5, 16), torch.tensor([0, -3, 7, 100, -1000])
    turn = Rotation.still(rope(pairs, pairing), 16, query.device)
    assert torch.equal(turn(query), query)
    assert turn.by(rope(pairs, pairing), by)(query) == pytest.approx(rope(pairs, pairing).move(query, by), abs=1e-5)


def ring(heads, capacity, dim, sinks, dtype=torch.float32, device="cpu", block=1):
    still = Rotation.still(rope(dim // 2, "half").__class__(rope(dim // 2, "half").inv_freq.to(device)), dim, device)
    still = still.by(Rope(rope(dim // 2, "half").inv_freq.to(device)), torch.tensor([-5], device=device))
    keys, values = torch.zeros(2, heads, capacity, dim, dtype=dtype, device=device)
    return Ring(keys, values, torch.zeros(1, dtype=torch.long, device=device), sinks, still, block)


def test_a_ring_keeps_the_sinks_and_the_most_recent():
    one = ring(2, 9, 8, 3)
    for t in range(40):
        attend_ring(one, 1.0, torch.randn(4, 8), torch.full((2, 8), float(t)), torch.full((2, 8), float(t)))
        one.counter += 1
    assert sorted(one.keys[0, :, 0].tolist()) == [0, 1, 2, *range(34, 40)]


@cuda
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "capacity", "sinks", "block", "dtype"),
    [
        (8, 8, 128, 100, 4, 1, torch.float32),
        (9, 3, 64, 65, 4, 1, torch.bfloat16),
        (4, 1, 80, 33, 0, 1, torch.float32),
        (6, 2, 96, 300, 70, 1, torch.float16),
        (8, 8, 128, 100, 4, 48, torch.float32),
        (4, 2, 64, 65, 0, 32, torch.float32),
    ],
)
def test_the_ring_kernel_computes_what_plain_torch_does(heads, kv_heads, dim, capacity, sinks, block, dtype):
    torch.manual_seed(0)
    ours, plain = (ring(kv_heads, capacity, dim, sinks, dtype, "cuda", block) for _ in range(2))
    for _ in range(2 * capacity + 10):
        query = torch.randn(heads, dim, dtype=dtype, device="cuda")
        key, value = torch.randn(2, kv_heads, dim, dtype=dtype, device="cuda")
        got = attend_ring(ours, 0.1, query, key, value)
        wanted = attend_plainly(plain, 0.1, query, key, value, 0.0, None)
        assert apart(got, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)
        ours.counter += 1
        plain.counter += 1
    assert torch.equal(ours.keys, plain.keys)
    assert torch.equal(ours.values, plain.values)


@pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs CUDA, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "pairs"), [(6, 2, 64, 24), (11, 11, 80, 10), (16, 16, 128, 64), (9, 3, 48, 24)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fold_kernel_computes_what_plain_torch_does(dtype, heads, kv_heads, dim, pairs, pairing):
    torch.manual_seed(0)
    turning = Rope(rope(pairs, pairing).inv_freq.to(DEVICE), pairing)
    query, out = torch.randn(2, 2, 37, heads, dim, dtype=dtype, device=DEVICE).transpose(2, 3)
    keys, values = torch.randn(2, 2, kv_heads, 4, dim, dtype=dtype, device=DEVICE)
    log_sum = torch.randn(2, heads, 37, device=DEVICE)
    turn = Rotation.still(turning, dim, query.device).by(turning, -3 * torch.arange(37, device=DEVICE))
    part = softmax(Scores(0.125).of(turn(query.float()), keys.float()), values.float())
    wanted, _ = fold(out.float(), log_sum, *part)
    fold_sinks(query, out, log_sum, keys, values, turn, 0.125)
    assert apart(out, wanted) < (1e-5 if dtype == torch.float32 else 1e-2)


@cuda
@pytest.mark.parametrize(
    ("first", "begin", "n", "recent", "block"),
    [
        (0, 4, 300, 60, 1),
        (2, 4, 90, 60, 1),
        (0, 4, 90, None, 1),
        (0, 0, 90, 60, 1),
        (300, 240, 500, 60, 1),
        (64, 4, 1, 60, 1),
        (0, 4, 300, 60, 30),
        (300, 244, 500, 60, 30),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float16, 64), (torch.bfloat16, 64), (torch.float32, 64), (torch.float32, 128), (torch.float32, 256)],
)
def test_the_band_on_a_gpu_is_that_of_plain_torch(first, begin, n, recent, block, dtype, dim):
    torch.manual_seed(0)
    held = first + n - begin
    query = torch.randn(1, 6, n, dim, dtype=dtype, device="cuda")
    key, value = torch.randn(2, 1, 2, held, dim, dtype=dtype, device="cuda")
    sinks = begin if begin <= 4 else 4
    policy = Policy(None if recent is None else sinks + recent, sinks, block)
    plan = LayerPlan(policy, "cache", Format(), LayerSizes("full", 2, 64))
    got = band(query, key, value, first, begin, plan, Scores(0.125))
    wanted = band(query.double().cpu(), key.double().cpu(), value.double().cpu(), first, begin, plan, Scores(0.125))
    blind = max(0, begin - first)  # rows of tokens before the first key
    assert not got[0][:, :, :blind].any()
    assert (got[1][:, :, :blind] == -torch.inf).all()
    single = dtype == torch.float32
    assert apart(got[0].cpu(), wanted[0]) < (1e-5 if single else 1e-2)
    assert apart(got[1][:, :, blind:].cpu(), wanted[1][:, :, blind:]) < (1e-5 if single else 1e-3)
