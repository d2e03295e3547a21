"""Products of one vector with the matrices of the experts that were chosen for it, as Triton programs.

The matrices are read where they lie, by numbers that lie on the device. They are bound by memory: a program asks for
several tiles of its matrix before the first of them meets the vector, adds up elementwise in registers, and only at its
end over its threads, so that none of them waits for others in between. All programs of a launch are to fit on the
device at once, and so end at about the same time.

Three launches make an expert: the first product, gated as it is written; parts of the second, each over some of the
depth; and what adds up the parts and, by their shares, the experts. The first one lets the next begin only after it has
waited itself: so what was written before it, as the experts' numbers, the two behind it may read before they wait.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels.ahead import launch
from sinkbench.attention.kernels.overlap import begin_next, overlapping, wait_for_last
from sinkbench.engines.single.gates import Gate, let_through

VECTOR = 16  # bytes that a thread reads at once
WARPS = 8  # a program
ACROSS = 128  # bytes that a program reads side by side of a transposed matrix
OUTPUTS = 4  # rows of any other that a program reads at once
LOADS = 12  # of a thread that are asked for before others are met, at most
PROGRAMS = 300  # a launch: fewer share the depth among more
LEAST = 8  # tiles of the depth, below which nobody shares
BLOCK = 128  # numbers that a program adds up


@triton.jit
def _tiles(
    place, inside, rows, left,
    ROWS: tl.constexpr, COUNT: tl.constexpr, APART: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``COUNT`` tiles, one behind the other along the depth, of which so much is ``left``; nothing waits for them."""
    tiles = ()
    for i in tl.static_range(COUNT):
        if EVEN:
            own = tl.load(place + i * APART, eviction_policy="evict_first")
        else:
            there = rows + i * ROWS < left
            there = there[:, None] & inside[None, :] if TRANSPOSED else inside[:, None] & there[None, :]
            own = tl.load(place + i * APART, mask=there, other=0.0, eviction_policy="evict_first")
        tiles = tiles + (own,)  # type: ignore[assignment] # Triton has tuples alone
    return tiles


@triton.jit
def _on_their_way(OVERLAP: tl.constexpr):
    """A line that no load may be moved across: a compiler would spare registers, and ask for one after the other."""
    if OVERLAP:
        tl.inline_asm_elementwise("bar.warp.sync 0xffffffff; // $0", "=r", [], tl.int32, is_pure=False, pack=1)


@triton.jit
def _met(sums, tiles, x, rows, left, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr):
    """``sums`` and, elementwise, the tiles times their part of the vector."""
    for i in tl.static_range(len(tiles)):
        part = tl.load(x + i * ROWS) if EVEN else tl.load(x + i * ROWS, mask=rows + i * ROWS < left, other=0.0)
        if TRANSPOSED:
            sums += tiles[i].to(tl.float32) * part.to(tl.float32)[:, None]
        else:
            sums += tiles[i].to(tl.float32) * part.to(tl.float32)[None, :]
    return sums


@triton.jit
def _multiply(
    x, weight, columns, inside, depth, steps,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, WAIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """``(COLUMNS,)``: so much ``depth`` of some columns, times a vector; waits, if so, with tiles on their way."""
    rows = tl.arange(0, ROWS)
    x += rows
    APART: tl.constexpr = ROWS * STRIDE if TRANSPOSED else ROWS  # one tile from the next
    if TRANSPOSED:
        place = weight + (rows[:, None] * STRIDE + columns[None, :])
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        place = weight + (columns[:, None] * STRIDE + rows[None, :])
        sums = tl.zeros((COLUMNS, ROWS), tl.float32)
    tiles = _tiles(place, inside, rows, depth, ROWS, COUNT, APART, TRANSPOSED, EVEN)
    if WAIT:
        wait_for_last(OVERLAP)
    _on_their_way(OVERLAP)
    sums = _met(sums, tiles, x, rows, depth, ROWS, TRANSPOSED, EVEN)
    for step in range(1, steps):
        left = depth - step * COUNT * ROWS
        place += COUNT * APART
        x += COUNT * ROWS
        tiles = _tiles(place, inside, rows, left, ROWS, COUNT, APART, TRANSPOSED, EVEN)
        _on_their_way(OVERLAP)
        sums = _met(sums, tiles, x, rows, left, ROWS, TRANSPOSED, EVEN)
    return tl.sum(sums, axis=0 if TRANSPOSED else 1)


@triton.jit
def _first(
    x, out, weight, bias, experts, steps,
    BIAS: tl.constexpr, KIND: tl.constexpr, INTERLEAVED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    SHARE: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of the first product of an expert; gated, half as many, half of those open, half pass."""
    wait_for_last(OVERLAP)
    begin_next(OVERLAP)
    kind: tl.constexpr = out.dtype.element_ty
    block, k = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts + k).to(tl.int64)
    c = tl.arange(0, COLUMNS)
    HALF: tl.constexpr = COLUMNS // 2
    if KIND == "none" or INTERLEAVED:
        columns = block * COLUMNS + c
        inside = columns < WIDTH
    else:
        columns = block * HALF + c % HALF + c // HALF * (WIDTH // 2)
        inside = block * HALF + c % HALF < WIDTH // 2
    got = _multiply(
        x, weight + expert * (DEPTH * WIDTH), columns, inside, DEPTH, steps,
        COLUMNS, ROWS, COUNT, WIDTH if TRANSPOSED else DEPTH, TRANSPOSED, EVEN, False, OVERLAP,
    )  # fmt: skip
    if BIAS:
        got += tl.load(bias + expert * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    if KIND == "none":
        tl.store(out + k * WIDTH + columns, got.to(kind), mask=inside)
    else:
        got = got.to(kind).to(tl.float32)
        if INTERLEAVED:
            gate, up = tl.split(tl.reshape(got, (HALF, 2)))
        else:
            gate, up = tl.split(tl.trans(tl.reshape(got, (2, HALF))))
        own = block * HALF + tl.arange(0, HALF)
        passed = let_through(gate, up, KIND, ALPHA, LIMIT, kind)
        tl.store(out + k * (WIDTH // 2) + own, passed.to(kind), mask=own < WIDTH // 2)


@triton.jit
def _second(
    x, parts, weight, experts, steps,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
    SHARE: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Some columns of a part of the second product of an expert."""
    begin_next(OVERLAP)
    k, part = tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + k).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    begin = part * SHARE
    weight += expert * (DEPTH * WIDTH) + begin * (WIDTH if TRANSPOSED else 1)
    got = _multiply(
        x + k * DEPTH + begin, weight, columns, inside, tl.minimum(SHARE, DEPTH - begin), steps,
        COLUMNS, ROWS, COUNT, WIDTH if TRANSPOSED else DEPTH, TRANSPOSED, EVEN, True, OVERLAP,
    )  # fmt: skip
    tl.store(parts + (k * tl.num_programs(2) + part) * WIDTH + columns, got, mask=inside)


@triton.jit
def _weighted(
    parts, out, bias, experts, shares, width,
    BIAS: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """What the experts found, rounded as their product would be, times their shares, added up."""
    begin_next(OVERLAP)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    kind: tl.constexpr = out.dtype.element_ty
    beside = ()
    for k in tl.static_range(EXPERTS):
        if BIAS:
            place = bias + tl.load(experts + k).to(tl.int64) * width + columns
            one = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        else:
            one = tl.zeros((BLOCK,), tl.float32)
        beside = beside + (one,)  # type: ignore[assignment] # Triton has tuples alone
    wait_for_last(OVERLAP)
    sums = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(EXPERTS):
        found = beside[k]  # type: ignore[var-annotated]
        for part in tl.static_range(PARTS):
            found += tl.load(parts + (k * PARTS + part) * width + columns, mask=inside, other=0.0)
        found = found.to(kind).to(tl.float32) * tl.load(shares + k).to(tl.float32)
        if shares.dtype.element_ty == kind:
            found = found.to(kind).to(tl.float32)
        sums += found
    tl.store(out + columns, sums.to(kind), mask=inside)


@cache
def _tiling(depth: int, width: int, count: int, size: int, transposed: bool, shared: bool) -> tuple[Any, ...]:
    """How ``count`` matrices of numbers of ``size`` bytes are read: a grid, the steps, and what else programs are told.

    A row of a matrix that is not transposed is read by all threads of a program, which are fewer where it is short: so
    each of them holds the numbers of the vector that its own meet.
    """
    warps = WARPS if transposed else min((4, 2, 1), key=lambda n: -(-depth * size // (n * 32 * VECTOR)) * n)
    held = warps * 32 * VECTOR // size  # numbers that the threads read at once
    columns, rows, loads = (ACROSS // size, held * size // ACROSS, 1) if transposed else (OUTPUTS, held, OUTPUTS)
    blocks, tiles = triton.cdiv(width, columns), triton.cdiv(depth, rows)
    parts = min(triton.cdiv(PROGRAMS, blocks * count), max(1, tiles // LEAST)) if shared else 1
    parts = next((n for n in range(parts, 2 * parts) if tiles % n == 0), parts)  # alike, where they can be
    tiles = triton.cdiv(tiles, parts)
    parts = triton.cdiv(depth, tiles * rows)
    most = max(1, min(tiles, LOADS // loads))
    each = next((n for n in range(most, most // 2, -1) if tiles % n == 0), most)
    even = width % columns == 0 and depth == parts * tiles * rows and tiles % each == 0
    told = {"DEPTH": depth, "WIDTH": width, "COLUMNS": columns, "ROWS": rows, "COUNT": each, "SHARE": tiles * rows}
    return (
        (blocks, count, parts),
        triton.cdiv(tiles, each),
        told | {"TRANSPOSED": transposed, "EVEN": even, "num_warps": warps},
    )


def first(
    x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, transposed: bool, gate: Gate | None
) -> Tensor:
    """Of each of ``experts``, ``(K,)``, its matrix times ``x``, plus its bias; gated where a gate is given.

    Args:
        x: ``(1, depth)``, contiguous.
        weight: ``(E, n, depth)``, or, ``transposed``, ``(E, depth, n)``.
        bias: ``(E, n)``.

    Returns:
        ``(K, n)``, or, gated, ``(K, n / 2)``, summed in float32.
    """
    depth, width = _sizes(weight, transposed)
    grid, steps, told = _tiling(depth, width, len(experts), x.element_size(), transposed, False)
    out = x.new_empty(len(experts), width if gate is None else width // 2)
    told = told | {"KIND": "none", "INTERLEAVED": False, "ALPHA": 0.0, "LIMIT": 0.0}
    if gate is not None:
        told |= {"KIND": gate.kind, "INTERLEAVED": gate.interleaved, "ALPHA": gate.alpha, "LIMIT": gate.limit}
    beside = weight if bias is None else bias
    told |= {"BIAS": bias is not None, **overlapping(x)}
    launch(_first, grid, x, out, weight, beside, experts, steps, **told)
    return out


def second(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, shares: Tensor, transposed: bool) -> Tensor:
    """``(1, n)``: the sum over ``experts``, ``(K,)``, of share times matrix times vector plus bias.

    Args:
        x: ``(K, depth)``, contiguous, what :func:`first` made, by whatever gate.
        weight: ``(E, n, depth)``, or, ``transposed``, ``(E, depth, n)``.
        bias: ``(E, n)``.
        shares: ``(K,)``, of the dtype of ``x`` or in float32.
    """
    depth, width = _sizes(weight, transposed)
    grid, steps, told = _tiling(depth, width, len(experts), x.element_size(), transposed, True)
    parts = x.new_empty(*grid[1:], width, dtype=torch.float32)
    launch(_second, grid, x, parts, weight, experts, steps, **told, **overlapping(x))
    out = x.new_empty(1, width)
    beside = weight if bias is None else bias
    told = {"BIAS": bias is not None, "EXPERTS": grid[1], "PARTS": grid[2], "BLOCK": BLOCK, "num_warps": 4}
    blocks = (triton.cdiv(width, BLOCK),)
    launch(_weighted, blocks, parts, out, beside, experts, shares, width, **told, **overlapping(x))
    return out


def _sizes(weight: Tensor, transposed: bool) -> tuple[int, int]:
    """The depth and the width of each matrix of ``weight``."""
    return (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])
