"""Keys and values through a format and back: what is read of numbers that were stored in fewer bits.

Nothing is packed: the cache holds the decoded numbers, in the model's dtype, which is what an attention would read.
Divisors are tensors, as a division by a Python number is a product with its reciprocal on CUDA, and rounds otherwise.
"""

import torch
from torch import Tensor

from sinkbench.compilers import by_program
from sinkbench.positions.rotary import Rope, wide
from sinkbench.strategies.formats import BLOCKS, Format, Kivi

LARGEST_FP8 = 448.0


def read_back(stored: Format, x: Tensor) -> Tensor:
    """``x``, of shape ``(B, H, n, D)``, encoded and decoded number by number or in blocks along ``D``, in its dtype.

    As computed where ``stored`` does neither.
    """
    if stored.name == "fp8_e4m3":
        return x.clamp(-LARGEST_FP8, LARGEST_FP8).to(torch.float8_e4m3fn).to(x.dtype)
    if stored.name not in BLOCKS:
        return x
    size = BLOCKS[stored.name][0]
    found: Tensor | None = by_program(x, "sinkbench.cache.kernels.blocks.read_back", x, size, stored.name == "q8_0")
    if found is not None:
        return found
    blocks = x.float().unflatten(-1, (-1, size))
    decoded = _q8_0(blocks) if stored.name == "q8_0" else _q4_0(blocks)
    return decoded.flatten(-2).to(x.dtype)


def keys_read_back(stored: Format, keys: Tensor, rope: Rope | None, by: int) -> Tensor:
    """As :func:`read_back`, of keys that a model has rotated ``by`` positions short of their place in the text.

    They are stored as rotated at that place: where a cache lets positions begin anew, now and then, to keep them small,
    is no part of what a format means, and differs from engine to engine.
    """
    if rope is None or by == 0 or stored.name not in BLOCKS:
        return read_back(stored, keys)
    move = torch.tensor([by], device=keys.device)
    at_place = rope.move(keys.to(wide(keys.dtype)), move)
    return rope.move(read_back(stored, at_place), -move).to(keys.dtype)


def _q8_0(blocks: Tensor) -> Tensor:
    """GGUF's Q8_0 of float32 blocks ``(..., 32)``: a half-precision scale, and integers from -127 to 127."""
    scale = blocks.abs().amax(-1, keepdim=True) / torch.full((), 127.0, device=blocks.device)
    exact = blocks * _reciprocal(scale)
    size = exact.abs()
    floor = size.floor()
    codes = exact.sign() * (floor + (2 * (size - floor)).floor())  # half away from zero
    return _integers(codes) * scale.half().float()


def _q4_0(blocks: Tensor) -> Tensor:
    """GGUF's Q4_0 of float32 blocks ``(..., 32)``: a half-precision scale, and integers from -8 to 7.

    The number of largest size, of equal ones the first, becomes -8.
    """
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = (blocks * _reciprocal(scale) + 8.5).trunc().clamp(0, 15) - 8
    return _integers(codes) * scale.half().float()


def _reciprocal(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, scale.reciprocal())


def _integers(codes: Tensor) -> Tensor:
    """Without what no integer is: negative zeros; and what comes of scales so small that they are stored as zeros."""
    return codes.nan_to_num(0.0, 0.0, 0.0) + 0.0


def kivi_keys(stored: Kivi, keys: Tensor) -> Tensor:
    """``(B, H, n, D)`` keys encoded and decoded a channel, in groups of consecutive tokens that divide ``n``."""
    return _kivi(keys.unflatten(2, (-1, stored.group)), 3, stored.bits).flatten(2, 3)


def kivi_values(stored: Kivi, values: Tensor) -> Tensor:
    """``(B, H, n, D)`` values encoded and decoded a token, in groups of channels."""
    return _kivi(values.unflatten(3, (-1, stored.group)), 4, stored.bits).flatten(3)


def _kivi(groups: Tensor, dim: int, bits: int) -> Tensor:
    """KIVI's codes of groups along ``dim``: from the minimum up, half to even; minimum and scale in the own dtype."""
    dtype, largest = wide(groups.dtype), 2**bits - 1
    low, high = (x.to(dtype) for x in groups.aminmax(dim=dim, keepdim=True))
    scale = ((high - low) / torch.full((), largest, dtype=dtype, device=groups.device)).to(groups.dtype).to(dtype)
    codes = ((groups.to(dtype) - low) / torch.where(scale == 0, 1.0, scale)).round().clamp(0, largest)
    return (codes * scale + low).to(groups.dtype)
