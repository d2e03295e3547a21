"""The rotary functions of transformers' models, for many tokens, as one Triton launch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.angles import Layout
from sinkbench.compilers import attempted
from sinkbench.engines.many.launching import takes
from sinkbench.engines.single.product import DTYPES
from sinkbench.engines.single.rotary import LAYOUTS, parts_of, same

TILE = 2048  # numbers of a program, some heads of one token
ASKED = 3  # tokens that a rotary function is asked about


@dataclass(frozen=True)
class Way:
    """How a rotary function takes its heads.

    Attributes:
        tokens: the dimension of tokens, of ``(B, H, n, D)`` or ``(B, n, H, D)``.
    """

    layout: Layout
    tokens: int

    def rotating(self, cos: Tensor) -> int:
        """Features that turn."""
        return cos.shape[-1] * (2 if self.layout.short else 1)

    def plainly(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """What the program computes, in plain torch."""
        count = self.rotating(cos)
        f, half = torch.arange(count, device=x.device), count // 2
        low = f % 2 == 0 if self.layout.interleaved else f < half
        partner = f + torch.where(low, 1, -1) * (1 if self.layout.interleaved else half)
        pair = f // 2 if self.layout.interleaved else f % half
        c, s = (a.float().unsqueeze(3 - self.tokens)[..., pair if self.layout.by_pair else f] for a in (cos, sin))
        y = x[..., :count].float()
        turned = y * c + torch.where(low, -y[..., partner], y[..., partner]) * s
        return torch.cat((turned.to(x.dtype), x[..., count:]), dim=-1)

    def takes(self, heads: Sequence[Tensor], cos: Tensor) -> bool:
        """Whether these are heads of the tokens with these angles."""
        streams, n, _ = cos.shape
        apart = all(x.shape[self.tokens] == n and x.stride(-1) == 1 and streams in (1, len(x)) for x in heads)
        return apart and all(x.shape[0] == heads[0].shape[0] for x in heads)


@triton.jit
def _turn(
    x, cos, sin, out, n, heads, half, dim, x_stream, x_token, x_head, out_stream, out_token, out_head,
    angle_stream, angle_token,
    INTERLEAVED: tl.constexpr, BY_PAIR: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stream, token = row // n, row % n
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    there = (h < heads)[:, None]
    source = x + stream * x_stream + token * x_token + h[:, None] * x_head
    target = out + stream * out_stream + token * out_token + h[:, None] * out_head
    cos += stream * angle_stream + token * angle_token
    sin += stream * angle_stream + token * angle_token
    p, f = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    turning, both = p < half, f < 2 * half
    if BY_PAIR:
        low_cos = tl.load(cos + p, mask=turning, other=0.0)
        low_sin = tl.load(sin + p, mask=turning, other=0.0)
        high_cos, high_sin = low_cos, low_sin
    elif INTERLEAVED:
        low_cos, high_cos = tl.split(tl.reshape(tl.load(cos + f, mask=both, other=0.0), (PAIRS, 2)))
        low_sin, high_sin = tl.split(tl.reshape(tl.load(sin + f, mask=both, other=0.0), (PAIRS, 2)))
    else:
        low_cos = tl.load(cos + p, mask=turning, other=0.0)
        low_sin = tl.load(sin + p, mask=turning, other=0.0)
        high_cos = tl.load(cos + half + p, mask=turning, other=0.0)
        high_sin = tl.load(sin + half + p, mask=turning, other=0.0)
    if INTERLEAVED:
        whole = tl.load(source + f[None, :], mask=there & both[None, :], other=0.0)
        low, high = tl.split(tl.reshape(whole, (HEADS, PAIRS, 2)))
    else:
        low = tl.load(source + p[None, :], mask=there & turning[None, :], other=0.0)
        high = tl.load(source + half + p[None, :], mask=there & turning[None, :], other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    kind = out.dtype.element_ty
    a = (low * low_cos.to(tl.float32)[None, :] - high * low_sin.to(tl.float32)[None, :]).to(kind)
    b = (high * high_cos.to(tl.float32)[None, :] + low * high_sin.to(tl.float32)[None, :]).to(kind)
    if INTERLEAVED:
        turned = tl.reshape(tl.join(a, b), (HEADS, 2 * PAIRS))
        tl.store(target + f[None, :], turned, mask=there & both[None, :])
    else:
        tl.store(target + p[None, :], a, mask=there & turning[None, :])
        tl.store(target + half + p[None, :], b, mask=there & turning[None, :])
    if REST > 0:
        r = 2 * half + tl.arange(0, REST)
        still = there & (r < dim)[None, :]
        tl.store(target + r[None, :], tl.load(source + r[None, :], mask=still, other=0.0), mask=still)


def turn(x: Tensor, cos: Tensor, sin: Tensor, way: Way, out: Tensor | None = None) -> Tensor:
    """``x``, turned, into ``out`` of the same shape, or else into memory that lies as ``(B, n, H, D)``.

    Args:
        cos: ``(1 or B, n, angles)``, contiguous; so ``sin``.
    """
    dim, count, (tokens, of_heads) = x.shape[-1], way.rotating(cos), (way.tokens, 3 - way.tokens)
    streams, n, heads = x.shape[0], x.shape[tokens], x.shape[of_heads]
    if out is None:
        out = torch.empty(streams, n, heads, dim, dtype=x.dtype, device=x.device)
        out = out.transpose(1, 2) if tokens == 2 else out
    pairs = triton.next_power_of_2(count // 2)
    together = min(max(1, TILE // (2 * pairs)), triton.next_power_of_2(heads))
    strides = [y.stride(dim) for y in (x, out) for dim in (0, tokens, of_heads)]
    _turn[(streams * n, triton.cdiv(heads, together))](
        *(x, cos, sin, out, n, heads, count // 2, dim, *strides),
        *(cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        **{"INTERLEAVED": way.layout.interleaved, "BY_PAIR": way.layout.by_pair, "HEADS": together, "PAIRS": pairs},
        **{"REST": triton.next_power_of_2(dim - count) if dim > count else 0},
        **{"num_warps": min(4, max(1, together * pairs // 256))},
    )
    return out


@dataclass(frozen=True)
class Turned:
    """``like``, heads of many tokens, turned."""

    like: Tensor
    cos: Tensor
    sin: Tensor
    way: Way
    plain: Callable[[], Tensor]

    def keep(self) -> Tensor:
        found = attempted(turn, self.like, self.cos, self.sin, self.way)
        return self.plain() if found is None else found

    def into(self, target: Tensor) -> Tensor | None:
        """``target``, of the same shape, filled; ``None`` where it cannot be filled so."""
        return attempted(turn, self.like, self.cos, self.sin, self.way, target) if takes(self.like, target) else None


class Turn:
    """A model's rotary function, in one launch for each tensor where that gives the same.

    It is called with ``(query, key, cos, sin)``, or, in GPT-J and CodeGen, with ``(query or key, sin, cos)``. How it
    takes them is found at its first call, by asking it about a few tokens.
    """

    def __init__(self) -> None:
        self.ways: dict[tuple[Any, ...], Way | None] = {}

    def of(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Turned, ...] | None:
        """What ``function`` would answer with, promised; ``None`` where it has to be called."""
        heads, cos, sin = parts_of(args)
        if not heads or not _fit(heads, cos, sin):
            return None
        key = (len(heads), heads[0].shape[-1], heads[0].dtype, heads[0].device, cos.shape[-1], cos.dtype)
        if key not in self.ways:
            self.ways[key] = _way(function, heads, cos)
        way = self.ways[key]
        if way is None or not way.takes(heads, cos):
            return None
        cos, sin = cos.contiguous(), sin.contiguous()
        return tuple(Turned(x, cos, sin, way, partial(_plainly, function, args, i)) for i, x in enumerate(heads))


def _plainly(function: Callable[..., Any], args: tuple[Any, ...], index: int) -> Tensor:
    found: Any = function(*args)
    return found[index] if len(args) == 4 else found


def _fit(heads: Sequence[Any], cos: Any, sin: Any) -> bool:
    """Whether these may be heads, and the angles of their tokens."""
    if not takes(cos, sin) or cos.dim() != 3 or not all(isinstance(x, Tensor) and x.dim() == 4 for x in heads):
        return False
    first = heads[0]
    alike = all((x.dtype, x.device, x.shape[-1]) == (first.dtype, cos.device, first.shape[-1]) for x in heads)
    return alike and 1 < cos.shape[-1] <= first.shape[-1] and first.dtype in DTYPES and first.numel() > 0


def _way(function: Callable[..., Any], heads: Sequence[Tensor], cos: Tensor) -> Way | None:
    """How ``function`` takes such heads, found by asking it; ``None`` where that is not understood."""
    dim, count = heads[0].shape[-1], cos.shape[-1]
    for layout in LAYOUTS:
        if count * (2 if layout.short else 1) > dim or (count % 2 and not layout.short):
            continue
        for tokens in (2, 1):
            way = Way(layout, tokens)
            shape = (1, 2, ASKED, dim) if tokens == 2 else (1, ASKED, 2, dim)
            some = [torch.randn(shape, dtype=x.dtype, device=x.device) for x in heads]
            angles = torch.stack([layout.angles(count, cos.device) for _ in range(ASKED)])[None]
            c, s = angles.cos().to(cos.dtype), angles.sin().to(cos.dtype)
            try:
                wanted = function(*some, c, s) if len(some) > 1 else (function(*some, s, c),)
            except Exception:  # it takes them in another way
                continue
            if all(same(w, way.plainly(x, c, s)) for w, x in zip(wanted, some, strict=True)):
                return way
    return None
