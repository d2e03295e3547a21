"""Kernels can be asked for before they are launched: threads make them, and launches that come too early are left."""

import pytest
import torch

pytestmark = pytest.mark.cuda
ahead = pytest.importorskip("sinkbench.attention.kernels.ahead")
norm = pytest.importorskip("sinkbench.engines.single.norm")


def normalised_into(out, dim):
    """Fill ``out`` with a norm by a kernel for so many numbers; answer with what torch says."""
    x = torch.linspace(-2, 3, dim, device="cuda")
    found = norm.Norm(torch.ones_like(x), None, 1e-6)
    norm.normalise(x, None, (), None, found, out)
    return found.plainly(x)


def made(dim):
    """A result that nothing has been written to."""
    return torch.full((dim,), 7.0, device="cuda")


def assert_alike(out, wanted):
    assert out.cpu() == pytest.approx(wanted.cpu(), abs=1e-5)


# each test has numbers of its own, whose kernels no other test has made in this process


def test_a_launch_whose_kernel_is_not_there_yet_is_left_out_and_works_afterwards():
    out = made(1031)
    with ahead.asking(out.device):
        normalised_into(out, 1031)
    assert (out == 7).all()
    wanted = normalised_into(out, 1031)
    assert_alike(out, wanted)


def test_a_launch_whose_kernel_is_there_is_made_at_once():
    out = made(517)
    normalised_into(made(517), 517)
    with ahead.asking(out.device):
        wanted = normalised_into(out, 517)
    assert_alike(out, wanted)


def test_who_looks_at_what_a_kernel_finds_has_it_launched():
    out = made(2053)
    with ahead.asking(out.device):
        normalised_into(made(2053), 2053)
        with ahead.awaiting():
            wanted = normalised_into(out, 2053)
        assert_alike(out, wanted)


def launched_with_a_width_that_cannot_be():
    names = ["FIRST", "LAST", *(f"{n}_{f}" for n in ("FIRST", "LAST") for f in ("CENTRED", "ROUNDED", "BIAS"))]
    told = dict.fromkeys([*names, "MORE", "OVERLAP"], False)
    ahead.launch(norm._normalise, (1,), *[made(16)] * 9, *[0.0] * 4, 16, WIDTH=24, **told)


def test_a_kernel_that_cannot_be_made_says_so_where_it_is_launched():
    with ahead.asking(made(16).device):
        launched_with_a_width_that_cannot_be()
    with pytest.raises(Exception, match=r"power of 2|power of two"):
        launched_with_a_width_that_cannot_be()
