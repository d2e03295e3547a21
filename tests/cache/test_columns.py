"""Programs that join and keep the columns of a chunk, take numbers through blocks, or draw, do what torch does."""

from copy import deepcopy

import pytest
import torch
from kernels import DEVICE, HALF, where_kernels_run

from sinkbench import compilers
from sinkbench.cache import formats
from sinkbench.cache.columns import Columns, join, keep
from sinkbench.strategies import draws
from sinkbench.strategies.formats import parse

pytestmark = where_kernels_run
WINDOW = 37


def in_torch(monkeypatch):
    monkeypatch.setattr(compilers, "compiled_for", lambda x: False)


def slots_of(batch, heads, dims, held, memory, dtype):
    """A part of what a stack holds: rows of one layer among those of three."""
    keys, values = (torch.randn(3 * batch, heads, WINDOW + 1, dim, device=DEVICE).to(dtype) for dim in dims)
    tokens = torch.randint(0, 999, keys.shape[:3], device=DEVICE)
    carried = {name: torch.rand(keys.shape[:3], device=DEVICE) for name in memory}
    parts = [x.narrow(0, batch, batch) for x in (keys, values, tokens)]
    return Columns(*parts, {name: x.narrow(0, batch, batch) for name, x in carried.items()}, held)


def fields(entries):
    return entries.keys, entries.values, entries.tokens, *entries.memory.values()


@pytest.mark.parametrize("memory", [(), ("total",), ("one", "other")])
@pytest.mark.parametrize("dims", [(16, 16), (24, 8), (128, 80)])
@pytest.mark.parametrize(
    ("batch", "heads", "held", "n"), [(1, 1, 0, 5), (2, 3, 20, 17), (1, 2, WINDOW, 1500), (2, 1, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_chunk_is_joined_and_kept_as_in_torch(batch, heads, held, n, dims, memory, dtype, monkeypatch):
    pytest.importorskip("triton")
    slots = slots_of(batch, heads, dims, held, memory, dtype)
    # as a model lays them out: heads of one token side by side
    new = [torch.randn(batch, n, heads, dim, device=DEVICE).to(dtype).transpose(1, 2) for dim in dims]
    joined = join(slots, *new, 1000)
    alive = min(held + n, WINDOW)
    died = torch.stack([torch.randperm(held + n, device=DEVICE) for _ in range(batch * heads)])
    died = torch.where(died < held + n - alive, died % n, n).view(batch, heads, -1)
    kept, wanted_kept = deepcopy(slots), deepcopy(slots)
    kept.held = wanted_kept.held = alive
    keep(joined, died, kept)
    in_torch(monkeypatch)
    wanted = join(slots, *new, 1000)
    keep(wanted, died, wanted_kept)
    assert joined.held == wanted.held == held
    assert all(map(torch.equal, fields(joined), fields(wanted)))
    assert all(map(torch.equal, fields(kept), fields(wanted_kept)))


@pytest.mark.parametrize("name", ["q8_0", "q4_0"])
@pytest.mark.parametrize("size", [1e-38, 1e-7, 1e-3, 1.0, 3e4, 1e9, 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, HALF])
def test_numbers_out_of_blocks_are_those_of_torch(name, size, dtype, monkeypatch):
    pytest.importorskip("triton")
    x = (size * torch.randn(2, 33, 3, 96, device=DEVICE)).to(dtype).transpose(1, 2)
    x[0, 0, 0, :32], x[0, 0, 1, 5], x[0, 1, 0, 40], x[1, 0, 0, 70] = 0.0, float("inf"), float("nan"), float("-inf")
    x[0, 2, :, :32] = torch.arange(-16, 16) / 2 * size
    got = formats.read_back(parse(name), x)
    in_torch(monkeypatch)
    wanted = formats.read_back(parse(name), x)
    assert got.dtype == wanted.dtype
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("shape", [(1, 2, 3, 48), (2, 3, 32)])
def test_shapes_that_are_no_rows_of_blocks_are_left_to_torch(shape):
    pytest.importorskip("triton")
    from sinkbench.cache.kernels import blocks

    assert blocks.read_back(torch.randn(shape, device=DEVICE), 32, True) is None


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 777), (1, 4, 2048)])
def test_draws_are_those_of_torch(shape, monkeypatch):
    pytest.importorskip("triton")
    tokens = torch.randint(0, 2**40, shape, device=DEVICE)
    got = draws.draw(11, 3, tokens)
    in_torch(monkeypatch)
    assert torch.equal(got, draws.draw(11, 3, tokens))
    assert torch.equal(got, draws.draw(11, torch.full((shape[0], 1, 1), 3, device=DEVICE), tokens))
