"""The rotary functions of transformers' models, for one token, as one Triton launch or none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.ahead import awaiting, launch
from sinkbench.attention.kernels.angles import Angles, Layout
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.attention.kernels.pairs import turned
from sinkbench.engines.single.pending import Pending, memory, whole
from sinkbench.positions.rotary import Rope

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
    inside = f < dim
    wait_for_last(OVERLAP)
    found = turned(source + head * stride, cos, sin, f, inside, rotating, INTERLEAVED, BY_PAIR)
    tl.store(target + head * dim + f, found, mask=inside)


def turn(heads: Sequence[Tensor], angles: Angles, out: Sequence[Tensor]) -> None:
    """Fill ``out`` with one tensor or two of a token's heads, ``(1, H, 1, D)``, turned."""
    dim, layout = heads[0].shape[-1], angles.layout
    counts = [x.numel() // dim for x in heads]
    launch(
        _turn,
        (sum(counts),),
        *(heads[0], heads[-1], angles.cos, angles.sin, out[0], out[-1], counts[0]),
        *(_stride(heads[0]), _stride(heads[-1]), angles.rotating, dim),
        **{"INTERLEAVED": layout.interleaved, "BY_PAIR": layout.by_pair},
        **{"WIDTH": triton.next_power_of_2(dim), "num_warps": 1, **overlapping(angles.cos)},
    )


@dataclass(frozen=True)
class Turning:
    """A promise of heads, turned."""

    reads: tuple[Tensor, ...]
    angles: Angles
    results: tuple[Tensor, ...]

    def keep(self, pending: Pending) -> None:
        pending.settle(*self.reads)
        turn(self.reads, self.angles, self.results)

    def source(self, x: Tensor) -> Tensor | None:
        """The heads that ``x``, one of the results whole, is made of."""
        return next((s for s, r in zip(self.reads, self.results, strict=True) if whole(x, r)), None)


def promised(heads: Sequence[Tensor], angles: Angles, pending: Pending) -> tuple[Tensor, ...]:
    """``heads``, turned; features that no angle reaches stay."""
    results = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads)
    pending.promise(Turning(tuple(heads), angles, results))
    return results


def joined(parts: Sequence[Tensor], pending: Pending) -> Tensor | None:
    """Heads of which the first of two ``parts`` is turned, promised as one; ``None`` where that is not what they are.

    Many models turn a slice of each head, and join it and the rest anew: all of that is one rotation of the whole head.
    """
    first = pending.of(parts[0]) if len(parts) == 2 else None
    source = first.source(parts[0]) if isinstance(first, Turning) else None
    if source is None or not isinstance(first, Turning):
        return None
    rest = parts[1]
    if not rest.numel():
        return parts[0]
    beside = source.data_ptr() + source.shape[-1] * source.element_size() == rest.data_ptr()
    alike = (rest.dtype, rest.shape[:-1], rest.stride()) == (source.dtype, source.shape[:-1], source.stride())
    if not beside or not alike or memory(rest) != memory(source):
        return None
    shape = *source.shape[:-1], source.shape[-1] + rest.shape[-1]
    return promised((source.as_strided(shape, source.stride()),), first.angles, pending)[0]


def unturned(query: Tensor, key: Tensor, rope: Rope | None, pending: Pending) -> tuple[Tensor, Tensor, Angles | None]:
    """Heads ``(1, H, 1, D)`` as ``(H, D)``, and by which angles an attention has to turn them; ``None`` where not."""
    found = [pending.of(x) for x in (query, key)]
    sources = [p.source(x) for p, x in zip(found, (query, key), strict=True) if isinstance(p, Turning)]
    angles = [p.angles for p in found if isinstance(p, Turning)]
    if len(sources) < 2 or any(s is None for s in sources) or not angles[0].same(angles[1]) or not angles[0].of(rope):
        pending.settle(query, key)
        return query[0, :, 0], key[0, :, 0], None
    pending.settle(*sources)
    rows = [x.as_strided((x.numel() // x.shape[-1], x.shape[-1]), (_stride(x), 1)) for x in sources if x is not None]
    return rows[0], rows[1], angles[0]


def _stride(x: Tensor) -> int:
    """From one head to the next."""
    return next((s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1), x.shape[-1])


class Turn:
    """A model's rotary function, in one launch for one token where that gives the same.

    It is called with ``(query, key, cos, sin)``, or, in GPT-J and CodeGen, with ``(query or key, sin, cos)``. Which
    layout it has is found at its first call for one token, by asking the function itself.
    """

    def __init__(self, function: Callable[..., Any], pending: Pending | None = None) -> None:
        self.function, self.pending = function, pending or Pending()
        self.layouts: dict[tuple[Any, ...], Layout | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        heads, cos, sin = parts_of(args)
        if kwargs or not heads or not all(_fits(x, cos, sin) for x in heads):
            return self.function(*args, **kwargs)
        self.pending.settle(cos, sin)
        shape = (heads[0].shape[-1], cos.shape[-1], heads[0].dtype)
        if shape not in self.layouts:
            with awaiting():  # also for what torch is asked, as sums of single vectors are ours
                self.layouts[shape] = self._layout(heads, cos)
        layout = self.layouts[shape]
        if layout is None:
            return self.function(*args)
        out = promised(heads, Angles(cos.contiguous(), sin.contiguous(), layout), self.pending)
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
            got = promised(some, Angles(c, s, layout), Pending())
            if all(same(w, g) for w, g in zip(wanted, got, strict=True)):
                return layout
        return None


def same(wanted: Tensor, got: Tensor) -> bool:
    """Whether heads are alike but for rounding."""
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    close = 16 * torch.finfo(got.dtype).eps * float(got.abs().max())
    return float((wanted - got).abs().max()) <= close


def parts_of(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any]:
    """Heads, cosines and sines among the arguments of a rotary function; no heads where these are others."""
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
