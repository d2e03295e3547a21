"""Which tensors go to programs of ours."""

from torch import Tensor

from sinkbench.compilers import compiled_for
from sinkbench.engines.single.product import DTYPES


def takes(*tensors: object) -> bool:
    """Whether these are numbers of one shape and dtype that programs of ours read."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.dtype not in DTYPES or not first.numel() or not compiled_for(first):
        return False
    for x in tensors[1:]:
        if not isinstance(x, Tensor) or x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            return False
    return True


def from_row_to_row(x: Tensor) -> int | None:
    """How far apart the rows of ``x``, ``(..., n)``, lie; ``None`` where that is not one number, or they have gaps."""
    if x.dim() == 0 or x.stride(-1) != 1:
        return None
    apart, count = None, 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        apart = stride if apart is None else apart
        if stride != apart * count:
            return None
        count *= size
    return x.shape[-1] if apart is None else apart
