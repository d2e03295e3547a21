"""Products of matrices with one vector, bound by the memory that the matrices are read from, as a Triton program.

Matrices that meet the same vector are read by one launch: a short one never fills the device. A launch begins to read
its matrices while the one before it, which makes the vector, still runs (:mod:`sinkbench.attention.kernels.overlap`).
So that memory does not rest meanwhile, a program asks for all of its row at once, and holds it in registers: those of a
multiprocessor have 110 to 200 kB on their way while they wait. More threads than needed for that, each with less of a
row, have multiplied sooner once the vector is there, which is when memory does rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.engines.single.activation import activated
from sinkbench.engines.single.pending import Pending, whole

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in which programs of ours compute
MOST = 3  # matrices a launch
HELD = 256  # bytes of its rows of one matrix that a thread holds at most: a quarter of its registers
ROWS = 2  # of a matrix that a program holds where it can: they share what is read of the vector
LONGEST = 2**14  # bytes that these have together
VECTOR = 16  # bytes that a thread reads at once


@triton.jit
def _piece(
    row, BEGIN: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, POLICY: tl.constexpr
):
    """``COUNT`` times ``WIDTH`` numbers of a row, from ``BEGIN`` on; zeros behind its end."""
    d = BEGIN + tl.arange(0, COUNT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    if BEGIN + COUNT * WIDTH <= DEPTH:
        return tl.load(row + d, eviction_policy=POLICY)
    return tl.load(row + d, mask=d < DEPTH, other=0.0, eviction_policy=POLICY)


@triton.jit
def _read(row, PIECES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, POLICY: tl.constexpr):
    """All of a row, in pieces; nothing waits for them here."""
    pieces = ()
    for i in tl.static_range(len(PIECES)):
        one = _piece(row, PIECES[i][0], PIECES[i][1], WIDTH, DEPTH, POLICY)
        pieces = pieces + (one,)  # type: ignore[assignment] # Triton has tuples alone
    return pieces


@triton.jit
def _dot(row, x, PIECES: tl.constexpr):
    """The product of two rows read in the same pieces, a number in float32."""
    sums = tl.sum(row[0].to(tl.float32) * x[0].to(tl.float32), axis=0)
    for i in tl.static_range(1, len(PIECES)):
        sums += tl.sum(row[i].to(tl.float32) * x[i].to(tl.float32), axis=0)
    return tl.sum(sums, axis=0)


@triton.jit
def _multiply(
    x, out, first, second, third, first_bias, second_bias, third_bias, first_rows, second_rows, third_rows,
    BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    row = tl.program_id(0) * ROWS
    place = row
    weight, bias = first, first_bias
    if row >= first_rows:
        row -= first_rows
        weight, bias = second, second_bias
        if row >= second_rows:
            row -= second_rows
            weight, bias = third, third_bias
    start = weight + row.to(tl.int64) * DEPTH
    held, beside = (), ()
    for i in tl.static_range(ROWS):
        own = _read(start + i * DEPTH, PIECES, WIDTH, DEPTH, "evict_first")
        held = held + (own,)  # type: ignore[assignment] # Triton has tuples alone
        if BIAS:
            beside = beside + (tl.load(bias + row + i).to(tl.float32),)  # type: ignore[assignment]
    wait_for_last(OVERLAP)
    vector = _read(x, PIECES, WIDTH, DEPTH, "")
    for i in tl.static_range(ROWS):
        got = _dot(held[i], vector, PIECES)
        if BIAS:
            got += beside[i]
        if KIND != "none":
            got = activated(got.to(out.dtype.element_ty).to(tl.float32), KIND)
        tl.store(out + place + i, got.to(out.dtype.element_ty))


@triton.jit
def _multiply_gated(
    x, out, gate, up,
    KIND: tl.constexpr, PIECES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    row = tl.program_id(0)
    kind = out.dtype.element_ty
    start = row.to(tl.int64) * DEPTH
    opening = _read(gate + start, PIECES, WIDTH, DEPTH, "evict_first")
    passing = _read(up + start, PIECES, WIDTH, DEPTH, "evict_first")
    wait_for_last(OVERLAP)
    vector = _read(x, PIECES, WIDTH, DEPTH, "")
    opened = activated(_dot(opening, vector, PIECES).to(kind).to(tl.float32), KIND).to(kind).to(tl.float32)
    passed = _dot(passing, vector, PIECES).to(kind).to(tl.float32)
    tl.store(out + row, (opened * passed).to(kind))


def _rows(sizes: Sequence[int], depth: int, size: int) -> int:
    """Rows that a program reads of one of matrices with ``sizes`` rows each, of ``depth`` numbers of ``size`` bytes."""
    fits = ROWS * depth * size <= LONGEST and all(rows % ROWS == 0 for rows in sizes)
    return ROWS if fits else 1


@cache
def _shape(depth: int, size: int, rows: int) -> dict[str, Any]:
    """How a program reads so many ``rows`` of each of its matrices."""
    return _by(min(16, triton.next_power_of_2(triton.cdiv(depth * size * rows, 32 * HELD))), depth, size)


def _by(warps: int, depth: int, size: int) -> dict[str, Any]:
    """The same for a program of so many ``warps``: pieces that are powers of two of what they all read at once."""
    width = 32 * warps * VECTOR // size
    pieces, begin, left = [], 0, triton.cdiv(depth, width)
    while left:
        count = 1 << (left.bit_length() - 1)
        pieces.append((begin, count))
        begin, left = begin + count * width, left - count
    return {"PIECES": tuple(pieces), "WIDTH": width, "DEPTH": depth, "num_warps": warps}


def products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str = "none"
) -> list[Tensor]:
    """``weight @ x + bias`` for at most :data:`MOST` matrices ``(n, depth)``; ``x`` of ``depth`` numbers, any shape.

    Args:
        activation: what is computed of each number, rounded as torch would before.

    Returns:
        A vector ``(n,)`` for each, summed in float32.
    """
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(sum(sizes))
    _launch(x, weights, biases, activation, out)
    return list(out.split(sizes))


def _launch(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str, out: Tensor
) -> None:
    sizes, depth = [weight.shape[0] for weight in weights], weights[0].shape[1]
    spare = MOST - len(sizes)
    rows = _rows(sizes, depth, x.element_size())
    launch(
        _multiply,
        (sum(sizes) // rows,),
        *(x, out, *weights, *[weights[0]] * spare),
        *[bias if bias is not None else out for bias in biases],
        *[out] * spare,
        *(*sizes, *[0] * spare),
        **{"BIAS": biases[0] is not None, "KIND": activation, "ROWS": rows},
        **_shape(depth, x.element_size(), rows),
        **overlapping(x),
    )


@dataclass(frozen=True)
class Product:
    """A promise of ``activation(weight @ x + bias)``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    activation: str
    result: Tensor

    @property
    def results(self) -> tuple[Tensor, ...]:
        return (self.result,)

    @property
    def reads(self) -> tuple[Tensor, ...]:
        return (self.x,)

    def keep(self, pending: Pending) -> None:
        pending.settle(self.x)
        _launch(self.x.contiguous(), [self.weight], [self.bias], self.activation, self.result)


def promised(x: Tensor, weight: Tensor, bias: Tensor | None, pending: Pending, activation: str = "none") -> Tensor:
    """``activation(weight @ x + bias)``, ``(..., n)``, promised."""
    result = x.new_empty(*x.shape[:-1], weight.shape[0])
    pending.promise(Product(x, weight, bias, activation, result))
    return result


def activated_product(x: Tensor, activation: str, pending: Pending) -> Tensor | None:
    """The activation of ``x``, along with the product that it is promised to be; ``None`` where it is none."""
    found = pending.of(x)
    if not isinstance(found, Product) or found.activation != "none" or not whole(x, found.result):
        return None
    return promised(found.x, found.weight, found.bias, pending, activation).view(x.shape)


def gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate @ x) * (up @ x)``, ``(n,)``, rounded after each of these as torch would."""
    out = x.new_empty(gate.shape[0])
    shape = _shape(gate.shape[1], x.element_size(), rows=1)
    launch(_multiply_gated, (gate.shape[0],), x, out, gate, up, **{"KIND": activation}, **shape, **overlapping(x))
    return out
