"""Products of matrices with one vector, bound by the memory that the matrices are read from, as a Triton program.

Matrices that meet the same vector are read by one launch: a short one never fills the device. A launch begins to read
its matrices while the one before it, which makes the vector, still runs (:mod:`sinkbench.attention.kernels.overlap`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.engines.single.activation import activated
from sinkbench.engines.single.pending import Pending, whole

MOST = 3  # matrices a launch
WARPS = 4
# Rows that a program reads, and numbers of each at a time: the fastest of those tried on an H200, where a row is a
# multiple of the latter or nearly so, and elsewhere.
LONG, SHORT = (1, 2048), (4, 512)
WASTE = 1.2  # at most, of numbers read in vain behind the end of a row


@triton.jit
def _part(weight, rows, there, begin, depth, DEPTH: tl.constexpr):
    """Numbers of the rows from ``begin`` on."""
    d = begin + tl.arange(0, DEPTH)
    at = weight + rows.to(tl.int64)[:, None] * depth + d[None, :]
    return tl.load(at, mask=there[:, None] & (d < depth)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _dot(part, weight, x, rows, there, depth, DEPTH: tl.constexpr):
    """Products of the rows with ``x``, one number each, in float32; ``part`` is what was read of them already."""
    d = tl.arange(0, DEPTH)
    sums = part.to(tl.float32) * tl.load(x + d, mask=d < depth, other=0.0).to(tl.float32)[None, :]
    for begin in range(DEPTH, depth, DEPTH):
        some = tl.load(x + begin + d, mask=begin + d < depth, other=0.0).to(tl.float32)
        sums += _part(weight, rows, there, begin, depth, DEPTH).to(tl.float32) * some[None, :]
    return tl.sum(sums, axis=1)


@triton.jit
def _multiply(
    x, out, first, second, third, first_bias, second_bias, third_bias, first_rows, second_rows, third_rows, depth,
    BIAS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    begin_next(OVERLAP)
    program = tl.program_id(0)
    weight, bias, count, place = first, first_bias, first_rows, 0
    ends = tl.cdiv(first_rows, ROWS)
    if program >= ends:
        program -= ends
        weight, bias, place, count = second, second_bias, first_rows, second_rows
        ends = tl.cdiv(second_rows, ROWS)
        if program >= ends:
            program -= ends
            weight, bias, place, count = third, third_bias, first_rows + second_rows, third_rows
    rows = program * ROWS + tl.arange(0, ROWS)
    there = rows < count
    part = _part(weight, rows, there, 0, depth, DEPTH)
    wait_for_last(OVERLAP)
    got = _dot(part, weight, x, rows, there, depth, DEPTH)
    if BIAS:
        got += tl.load(bias + rows, mask=there, other=0.0).to(tl.float32)
    if KIND != "none":
        got = activated(got.to(out.dtype.element_ty).to(tl.float32), KIND)
    tl.store(out + place + rows, got.to(out.dtype.element_ty), mask=there)


@triton.jit
def _multiply_gated(
    x, out, gate, up, count, depth, KIND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    begin_next(OVERLAP)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < count
    kind = out.dtype.element_ty
    part = _part(gate, rows, there, 0, depth, DEPTH)
    wait_for_last(OVERLAP)
    opened = _dot(part, gate, x, rows, there, depth, DEPTH).to(kind).to(tl.float32)
    opened = activated(opened, KIND).to(kind).to(tl.float32)
    passed = _dot(_part(up, rows, there, 0, depth, DEPTH), up, x, rows, there, depth, DEPTH).to(kind).to(tl.float32)
    tl.store(out + rows, (opened * passed).to(kind), mask=there)


def _shape(depth: int) -> tuple[int, int]:
    """Rows of a program, and numbers of each at a time."""
    at_once = LONG[1]
    return LONG if triton.cdiv(depth, at_once) * at_once <= WASTE * depth else SHORT


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
    sizes = [weight.shape[0] for weight in weights]
    spare = MOST - len(sizes)
    rows, depth = _shape(weights[0].shape[1])
    biased = biases[0] is not None
    _multiply[(sum(triton.cdiv(size, rows) for size in sizes),)](
        *(x, out, *weights, *[weights[0]] * spare),
        *[bias if bias is not None else out for bias in biases],
        *[out] * spare,
        *(*sizes, *[0] * spare, weights[0].shape[1]),
        **{"BIAS": biased, "KIND": activation, "ROWS": rows, "DEPTH": depth, "num_warps": WARPS, **overlapping(x)},
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
    rows, depth = _shape(gate.shape[1])
    _multiply_gated[(triton.cdiv(gate.shape[0], rows),)](
        *(x, out, gate, up, gate.shape[0], gate.shape[1]),
        **{"KIND": activation, "ROWS": rows, "DEPTH": depth, "num_warps": WARPS, **overlapping(x)},
    )
    return out
