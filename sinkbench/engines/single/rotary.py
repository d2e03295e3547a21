"""The rotary functions of transformers' models, for one token, as one Triton launch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last


class Layout(NamedTuple):
    """How a rotary function pairs features and reads its angles.

    Attributes:
        interleaved: whether features ``2i`` and ``2i + 1`` are a pair, and not ``i`` and one half the features on.
        by_pair: whether pair ``i`` reads angle ``i``, and not each feature its own.
        short: whether there are as many angles as pairs, and not as many as features.
    """

    interleaved: bool
    by_pair: bool
    short: bool

    def angles(self, count: int, device: torch.device) -> Tensor:
        """``count`` random angles, laid out so."""
        if self.short:
            return torch.rand(count, device=device)
        each = torch.rand(count // 2, device=device)
        return each.repeat_interleave(2) if self.interleaved and not self.by_pair else torch.cat((each, each))


LAYOUTS = (
    Layout(False, False, False),  # Llama
    Layout(True, False, False),  # Cohere
    Layout(True, True, False),  # GLM
    Layout(False, True, True),  # gpt-oss
    Layout(True, True, True),  # GPT-J
)


@triton.jit
def _turn(
    first, second, cos, sin, first_out, second_out, first_heads, first_stride, second_stride, rotating, dim,
    INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    head = tl.program_id(0)
    source, target, stride = first, first_out, first_stride
    if head >= first_heads:
        head -= first_heads
        source, target, stride = second, second_out, second_stride
    f = tl.arange(0, WIDTH)
    inside, turning = f < dim, f < rotating
    half = rotating // 2
    if INTERLEAVED:
        low = f % 2 == 0
        partner = tl.where(low, f + 1, f - 1)
        pair = f // 2
    else:
        low = f < half
        partner = tl.where(low, f + half, f - half)
        pair = tl.where(low, f, f - half)
    angle = pair if BY_PAIR else f
    wait_for_last(OVERLAP)
    x = tl.load(source + head * stride + f, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + head * stride + partner, mask=turning, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=turning, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turning, other=0.0).to(tl.float32)
    turned = x * c + tl.where(low, -y, y) * s
    tl.store(target + head * dim + f, turned.to(target.dtype.element_ty), mask=inside)


def turned(heads: Sequence[Tensor], cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, ...]:
    """One tensor or two of a token's heads, ``(1, H, 1, D)``, turned; features that no angle reaches stay."""
    dim, rotating = heads[0].shape[-1], cos.numel() * (2 if layout.short else 1)
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads]
    counts = [x.numel() // dim for x in heads]
    _turn[(sum(counts),)](
        *(heads[0], heads[-1], cos.contiguous(), sin.contiguous(), out[0], out[-1], counts[0]),
        *(_stride(heads[0]), _stride(heads[-1]), rotating, dim),
        **{"INTERLEAVED": layout.interleaved, "BY_PAIR": layout.by_pair},
        **{"WIDTH": triton.next_power_of_2(dim), "num_warps": 1, **overlapping(cos)},
    )
    return tuple(out)


def _stride(x: Tensor) -> int:
    """From one head to the next."""
    return next((s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1), x.shape[-1])


class Turn:
    """A model's rotary function, in one launch for one token where that gives the same.

    It is called with ``(query, key, cos, sin)``, or, in GPT-J and CodeGen, with ``(query or key, sin, cos)``. Which
    layout it has is found at its first call for one token, by asking the function itself.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.layouts: dict[tuple[Any, ...], Layout | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        heads, cos, sin = _parts(args)
        if kwargs or not heads or not all(_fits(x, cos, sin) for x in heads):
            return self.function(*args, **kwargs)
        shape = (heads[0].shape[-1], cos.shape[-1], heads[0].dtype)
        if shape not in self.layouts:
            self.layouts[shape] = self._layout(heads, cos)
        layout = self.layouts[shape]
        if layout is None:
            return self.function(*args)
        out = turned(heads, cos, sin, layout)
        return out if len(heads) > 1 else out[0]

    def _layout(self, heads: Sequence[Tensor], cos: Tensor) -> Layout | None:
        some = [torch.randn_like(x) for x in heads]
        for layout in LAYOUTS:
            if cos.numel() * (2 if layout.short else 1) > some[0].shape[-1]:
                continue
            angles = layout.angles(cos.numel(), cos.device)
            c, s = (f.view(cos.shape).to(cos.dtype) for f in (angles.cos(), angles.sin()))
            try:
                wanted = self.function(*some, c, s) if len(some) > 1 else (self.function(*some, s, c),)
            except Exception:  # its angles are laid out in another way
                continue
            got = turned(some, c, s, layout)
            if all(_same(w, g) for w, g in zip(wanted, got, strict=True)):
                return layout
        return None


def _same(wanted: Tensor, got: Tensor) -> bool:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    close = 16 * torch.finfo(got.dtype).eps * float(got.abs().max())
    return float((wanted - got).abs().max()) <= close


def _parts(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any]:
    """Heads, cosines and sines."""
    if len(args) == 4:
        return args[:2], args[2], args[3]
    return (args[:1], args[2], args[1]) if len(args) == 3 else ((), None, None)


def _fits(x: Any, cos: Any, sin: Any) -> bool:
    """Whether ``x`` are the heads of one token, each contiguous, and ``cos`` and ``sin`` the angles of its position."""
    if not all(isinstance(part, Tensor) for part in (x, cos, sin)):
        return False
    if x.dim() != 4 or x.dtype == torch.float64 or x.stride(-1) != 1 or sum(n > 1 for n in x.shape[:-1]) > 1:
        return False
    return cos.shape == sin.shape and cos.numel() == cos.shape[-1] and 1 < cos.numel() <= x.shape[-1]
