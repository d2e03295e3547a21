"""Equal keys are told from others by a number each: on CUDA, or interpreted on a processor."""

import pytest
import torch
from kernels import DEVICE, where_kernels_run

pytestmark = where_kernels_run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("columns", "dim"), [(1, 16), (65, 24), (700, 128)])
def test_keys_have_one_mark_where_all_bits_are_equal(columns, dim, dtype):
    pytest.importorskip("triton")
    from sinkbench.attention.kernels.marks import marks_and_twins

    keys = torch.randn(4, columns, dim, device=DEVICE).to(dtype)
    keys[1, -1] = keys[1, 0]  # a head in which two are equal, far apart
    keys[2, columns // 2] = keys[2, columns // 3]
    near = keys[3] * (1 + 1e-3 * torch.randn_like(keys[3]))  # of one token at places nearby
    keys[3, columns // 2 :] = near[: columns - columns // 2]
    marks, twins = marks_and_twins(keys)
    same = (keys[:, :, None] == keys[:, None]).all(-1)
    assert torch.equal(marks[:, :, None] == marks[:, None], same)
    pairs = same.sum((1, 2)) > columns
    assert torch.equal(twins.bool(), pairs)
    assert columns == 1 or pairs.tolist()[:3] == [False, True, True]
