"""The scans of the patterns, and the attention that they end in, as Triton programs, for CUDA.

Shapes: ``R`` heads of keys and values of all streams, ``G`` query heads a group, ``n`` queries, ``m`` columns. A
program keeps the state of one head in registers: what is alive lies in slots, of which the one that dies is taken by
the next token; the newest token itself is held apart until it is known whether it stays. The row of the next token is
loaded while the present one is reduced: it can differ from what is read in one slot only, the one about to change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sinkbench.attention.kernels import MEETING
from sinkbench.attention.kernels.marks import marks_and_twins
from sinkbench.attention.scores import products_of

NOBODY = tl.constexpr(2147483647)  # no token has this index
GONE = tl.constexpr(1e-25)  # a sum of powers below this is formed anew, from its own largest score
BLOCK = 8  # heads of a group that are read at once


@triton.jit
def _lower_older(value, token, other, other_token):
    first = (value < other) | ((value == other) & (token < other_token))
    return tl.where(first, value, other), tl.where(first, token, other_token)


@triton.jit
def _lowest(value, token, can, newest, newest_can):
    """Token with the lowest value; of equal ones, the oldest; NOBODY where it is the newest.

    What is not a number counts as infinite.
    """
    value = tl.where(can & (value == value), value, float("inf"))  # noqa: PLR0124
    low, victim = tl.reduce((value, tl.where(can, token, NOBODY)), 0, _lower_older)
    return tl.where(newest_can & (newest < low), NOBODY, victim)


@triton.jit
def _lowest_about(value, token, can, newest, newest_can, tolerance):
    """As :func:`_lowest`, where values up to that share of the lowest above it are equal to it."""
    value = tl.where(can & (value == value), value, float("inf"))  # noqa: PLR0124
    low = tl.min(value, axis=0)
    low = tl.where(newest_can, tl.minimum(low, newest), low)
    ties = can & ((value <= low + tolerance * tl.abs(low)) | (value == low))
    return tl.min(tl.where(ties, token, NOBODY), axis=0)


@triton.jit
def _numbers(a, b, c, d, e):
    """As numbers on the device, whatever a launch made of them: of a 1 it makes a constant."""
    return (
        tl.full((), a, tl.int32),
        tl.full((), b, tl.int32),
        tl.full((), c, tl.int32),
        tl.full((), d, tl.int32),
        tl.full((), e, tl.int32),
    )


@triton.jit
def _shares(x, y, top, extra):
    """Shares of the slots ``(S, G)`` and of the newest ``(G,)`` in softmaxes, from scores and bounds of the largest."""
    e, f = tl.exp(x - top[None, :]), tl.exp(y - top)
    total = tl.sum(e, axis=0) + f + extra
    if tl.min(total, axis=0) < GONE:
        top = tl.maximum(tl.max(x, axis=0), y)
        top = tl.where(top == float("-inf"), 0.0, top)
        small = total < GONE
        e = tl.where(small[None, :], tl.exp(x - top[None, :]), e)
        f = tl.where(small, tl.exp(y - top), f)
        total = tl.where(small, tl.sum(e, axis=0) + f, total)
    return e / total[None, :], f / total


@triton.jit
def _fixed(
    scores, tokens, died, held, first, n, m, window, sinks, recent, tolerance,
    SLOTS: tl.constexpr, TOLERANT: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * m
    s = tl.arange(0, SLOTS)
    first, held, window, sinks, recent = _numbers(first, held, window, sinks, recent)
    alive = s < held
    columns = s
    token = tl.load(tokens + base + s, mask=alive, other=0).to(tl.int32)
    mine = tl.load(scores + base + s, mask=alive, other=0.0)
    for i in range(n):
        now, column = first + i, held + i
        new = tl.load(scores + base + column)
        can = alive & (token >= sinks) & (token <= now - recent)
        if TOLERANT:
            victim = _lowest_about(mine, token, can, new, recent == 0, tolerance)
        else:
            victim = _lowest(mine, token, can, new, recent == 0)
        gone = alive & (token == victim) & (now >= window)
        hit = gone | ((s == now) & (now < window))
        tl.store(died + base + columns, i, mask=gone)
        tl.store(died + base + column, i, mask=(victim == NOBODY) & (now >= window))
        columns = tl.where(hit, column, columns)
        token = tl.where(hit, now, token)
        mine = tl.where(hit, new, mine)
        alive = alive | hit


@triton.jit
def _summed(
    scores, largest, extra, totals, tokens, died, held, first, n, m, window, sinks, recent,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, AVERAGED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    base = head * m
    s = tl.arange(0, SLOTS)
    first, held, window, sinks, recent = _numbers(first, held, window, sinks, recent)
    alive = s < held
    columns = s
    token = tl.load(tokens + base + s, mask=alive, other=0).to(tl.int32)
    mine = tl.load(totals + base + s, mask=alive, other=0.0)
    g = tl.arange(0, BLOCK)
    rows = head * GROUP + g
    real = g < GROUP
    line = scores + rows * n * m
    x = tl.load(line[None, :] + columns[:, None], mask=real[None, :] & alive[:, None], other=float("-inf"))
    y = tl.load(line + held, mask=real, other=0.0)
    for i in range(n):
        now, column = first + i, held + i
        after = tl.minimum(i + 1, n - 1)  # the row of the next token, while this one is reduced
        line = scores + (rows * n + after) * m
        x_next = tl.load(line[None, :] + columns[:, None], mask=real[None, :] & alive[:, None], other=float("-inf"))
        joined = tl.load(line + column, mask=real, other=0.0)
        y_next = tl.load(line + held + after, mask=real, other=0.0)
        top = tl.load(largest + rows * n + i, mask=real, other=0.0)
        also = tl.load(extra + rows * n + i, mask=real, other=0.0)
        shares, share = _shares(x, y, top, also)
        mine += tl.sum(tl.where(real[None, :], shares, 0.0), axis=1)
        new = tl.sum(tl.where(real, share, 0.0), axis=0)
        for rest in range(BLOCK, GROUP, BLOCK):
            more = rest + g < GROUP
            others = head * GROUP + rest + g
            line = scores + (others * n + i) * m
            u = tl.load(line[None, :] + columns[:, None], mask=more[None, :] & alive[:, None], other=float("-inf"))
            v = tl.load(line + column, mask=more, other=0.0)
            top = tl.load(largest + others * n + i, mask=more, other=0.0)
            also = tl.load(extra + others * n + i, mask=more, other=0.0)
            shares, share = _shares(u, v, top, also)
            mine += tl.sum(tl.where(more[None, :], shares, 0.0), axis=1)
            new += tl.sum(tl.where(more, share, 0.0), axis=0)
        can = alive & (token >= sinks) & (token <= now - recent)
        value = mine
        if AVERAGED:
            value = mine / (now - token + 1).to(mine.dtype)
        victim = _lowest(value, token, can, new, recent == 0)
        gone = alive & (token == victim) & (now >= window)
        hit = gone | ((s == now) & (now < window))
        tl.store(died + base + columns, i, mask=gone)
        tl.store(died + base + column, i, mask=(victim == NOBODY) & (now >= window))
        columns = tl.where(hit, column, columns)
        token = tl.where(hit, now, token)
        mine = tl.where(hit, new, mine)
        alive = alive | hit
        x = tl.where(hit[:, None], joined[None, :], x_next)
        y = y_next
    tl.store(totals + base + columns, mine, mask=alive)


@triton.jit
def _newest(
    scores, largest, extra, tokens, died, board, counter, held, first, n, m, window, sinks, recent, heads,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One of the programs of a layer: it sums the shares of its heads, and reads those of all on a common board."""
    stream, part = tl.program_id(0), tl.program_id(1)
    base = stream.to(tl.int64) * m
    s = tl.arange(0, SLOTS)
    first, held, window, sinks, recent = _numbers(first, held, window, sinks, recent)
    alive = s < held
    columns = s
    token = tl.load(tokens + base + s, mask=alive, other=0).to(tl.int32)
    h = part * BLOCK + tl.arange(0, BLOCK)
    real = h < heads
    rows = stream.to(tl.int64) * heads + h
    line = scores + rows * n * m
    x = tl.load(line[None, :] + columns[:, None], mask=real[None, :] & alive[:, None], other=float("-inf"))
    y = tl.load(line + held, mask=real, other=0.0)
    parts = tl.arange(0, PROGRAMS)
    counter += stream
    board += stream.to(tl.int64) * 2 * PROGRAMS * WIDTH
    for i in range(n):
        now, column = first + i, held + i
        after = tl.minimum(i + 1, n - 1)
        line = scores + (rows * n + after) * m
        x_next = tl.load(line[None, :] + columns[:, None], mask=real[None, :] & alive[:, None], other=float("-inf"))
        joined = tl.load(line + column, mask=real, other=0.0)
        y_next = tl.load(line + held + after, mask=real, other=0.0)
        top = tl.load(largest + rows * n + i, mask=real, other=0.0)
        also = tl.load(extra + rows * n + i, mask=real, other=0.0)
        shares, share = _shares(x, y, top, also)
        mine = tl.sum(tl.where(real[None, :], shares, 0.0), axis=1)
        new = tl.sum(tl.where(real, share, 0.0), axis=0)
        if PROGRAMS > 1:
            # two boards in turn: who writes to one again has met all that have read it
            here = board + (i % 2) * PROGRAMS * WIDTH
            tl.store(here + part * WIDTH + s, mine, cache_modifier=".cg")
            tl.store(here + part * WIDTH + SLOTS, new, cache_modifier=".cg")
            tl.debug_barrier()
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") + 1
            while arrived < (i + 1) * PROGRAMS:
                arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
            tl.debug_barrier()
            mine = tl.sum(tl.load(here + parts[:, None] * WIDTH + s[None, :], cache_modifier=".cg"), axis=0)
            new = tl.sum(tl.load(here + parts * WIDTH + SLOTS, cache_modifier=".cg"), axis=0)
        can = alive & (token >= sinks) & (token <= now - recent)
        victim = _lowest(mine, token, can, new, recent == 0)
        gone = alive & (token == victim) & (now >= window)
        hit = gone | ((s == now) & (now < window))
        tl.store(died + base + columns, i, mask=gone & (part == 0))
        tl.store(died + base + column, i, mask=(victim == NOBODY) & (now >= window) & (part == 0))
        columns = tl.where(hit, column, columns)
        token = tl.where(hit, now, token)
        alive = alive | hit
        x = tl.where(hit[:, None], joined[None, :], x_next)
        y = y_next


@triton.jit
def _lower_older_and_sum(value, token, number, other, other_token, other_number):
    first = (value < other) | ((value == other) & (token < other_token))
    return tl.where(first, value, other), tl.where(first, token, other_token), number + other_number


@triton.jit
def _alike(
    products, scale, sums, marks, twins, tokens, died, held, first, n, m, window, sinks, recent, SLOTS: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    base = head * m
    s = tl.arange(0, SLOTS)
    first, held, window, sinks, recent = _numbers(first, held, window, sinks, recent)
    alive = s < held
    columns = s
    token = tl.load(tokens + base + s, mask=alive, other=0).to(tl.int32)
    mine = tl.load(sums + head * held + s, mask=alive, other=0.0).to(tl.float64)
    size = tl.load(scale + base + s, mask=alive, other=0.0)
    products += head * m * m
    twin = tl.load(twins + head)
    row = tl.load(products + held * m + columns, mask=alive, other=0.0)
    for i in range(n):
        now, column = first + i, held + i
        after = tl.minimum(i + 1, n - 1)
        line = products + (held + after).to(tl.int64) * m
        row_next = tl.load(line + columns, mask=alive, other=0.0)
        joined = tl.load(line + column)
        own = tl.load(products + column.to(tl.int64) * m + column)
        its = tl.load(scale + base + column)
        cosines = row * size * its
        mine -= cosines.to(tl.float64)
        can = alive & (token >= sinks) & (token <= now - recent)
        value = mine.to(row.dtype)  # sums are carried in float64, and compared as the products are
        value = tl.where(can & (value == value), value, float("inf"))  # noqa: PLR0124 - what is not a number
        low, victim, total = tl.reduce((value, tl.where(can, token, NOBODY), cosines), 0, _lower_older_and_sum)
        new = -total - own * its * its
        victim = tl.where((recent == 0) & (new < low), NOBODY, victim)
        if twin != 0:  # equal keys have equal scores, whatever rounding says: of those the oldest goes
            mark = tl.load(marks + base + columns, mask=alive, other=0)
            wanted = tl.sum(tl.where(alive & (token == victim), mark, 0), axis=0)
            wanted = tl.where(victim == NOBODY, tl.load(marks + base + column), wanted)
            victim = tl.min(tl.where(can & (mark == wanted), token, NOBODY), axis=0)
        gone = alive & (token == victim) & (now >= window)
        hit = gone | ((s == now) & (now < window))
        tl.store(died + base + columns, i, mask=gone)
        tl.store(died + base + column, i, mask=(victim == NOBODY) & (now >= window))
        place = tl.sum(tl.where(gone, columns, 0), axis=0)
        place = tl.where(victim == NOBODY, column, place)
        line = products + place.to(tl.int64) * m
        lost = tl.load(line + columns, mask=alive & (now >= window), other=0.0)
        theirs = tl.load(scale + base + place)
        last = tl.where(now >= window, tl.load(line + column), 0.0)
        mine += (lost * size * theirs).to(tl.float64)
        columns = tl.where(hit, column, columns)
        token = tl.where(hit, now, token)
        mine = tl.where(hit, (new + last * its * theirs).to(tl.float64), mine)
        size = tl.where(hit, its, size)
        row = tl.where(hit, joined, row_next)
        alive = alive | hit


@triton.jit
def _largest(scores, out, held, n, m, BLOCK: tl.constexpr):
    """The largest score of each row among the columns that have come."""
    row = tl.program_id(0).to(tl.int64)
    end = held + row % n + 1
    best = tl.full((BLOCK,), float("-inf"), scores.dtype.element_ty)
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(scores + row * m + at, mask=at < end, other=float("-inf")))
    tl.store(out + row, tl.max(best, axis=0))


def fixed(scores: Tensor, tokens: Tensor, died: Tensor, *, n: int, tolerance: float, **limits: int) -> None:
    """``scores``: of each column, ``(R, m)``, which never change; ``tokens``, ``died`` likewise."""
    slots = triton.next_power_of_2(limits["window"])
    arguments = _arguments(limits, n, tokens.shape[1])
    if not tolerance and scores.dtype == torch.float64:
        scores = _places(scores)  # half the registers
    _fixed[(len(tokens),)](
        *(scores, tokens, died),
        **arguments,
        **{"tolerance": tolerance, "TOLERANT": tolerance > 0, "SLOTS": slots, "num_warps": _warps(slots)},
    )


def summed(
    scores: Tensor, extra: Tensor | None, totals: Tensor, tokens: Tensor, died: Tensor, *, averaged: bool, **limits: int
) -> None:
    """``scores``: ``(R, G, n, m)``; ``extra``: a logit that joins each softmax, ``(R, G)``; ``totals`` change."""
    groups, n, m = scores.shape[1:]
    slots = triton.next_power_of_2(limits["window"])
    block = min(BLOCK, triton.next_power_of_2(groups))
    largest, powers = _bounds(scores, extra, limits["held"])
    _summed[(len(tokens),)](
        *(scores, largest, powers, totals, tokens, died),
        **_arguments(limits, n, m),
        **{"GROUP": groups, "BLOCK": block, "SLOTS": slots, "AVERAGED": averaged, "num_warps": _warps(slots * block)},
    )


def newest(
    scores: Tensor, extra: Tensor | None, tokens: Tensor, died: Tensor, *, beside: int = 1, **limits: int
) -> None:
    """Of ``B`` streams: ``scores`` ``(B, A, n, m)``, ``A`` all query heads; ``tokens``, ``died`` ``(B, m)``.

    So many launches of this may run ``beside`` each other.
    """
    streams, heads, n, m = scores.shape
    slots = triton.next_power_of_2(limits["window"])
    programs = min(MEETING, triton.next_power_of_2(heads)) if scores.is_cuda else 1
    block = triton.next_power_of_2(triton.cdiv(heads, programs))
    largest, powers = _bounds(scores, extra, limits["held"])
    processors = torch.cuda.get_device_properties(scores.device).multi_processor_count if programs > 1 else streams
    together = max(1, processors // (programs * beside))
    width = slots + 16
    for some in range(0, streams, together):  # programs that meet must all be running
        part = slice(some, some + together)
        board = scores.new_empty(len(tokens[part]), 2, programs, width)
        counter = torch.zeros(len(tokens[part]), dtype=torch.int32, device=scores.device)
        _newest[(len(tokens[part]), programs)](
            *(scores[part], largest[part], powers[part], tokens[part], died[part], board, counter),
            **_arguments(limits, n, m),
            **{"heads": heads, "PROGRAMS": programs, "BLOCK": block, "SLOTS": slots, "WIDTH": width},
            num_warps=_warps(slots * block),
        )


def alike(keys: Tensor, tokens: Tensor, died: Tensor, *, n: int, **limits: int) -> None:
    """``keys``: ``(R, m, D)``; ``tokens``, ``died``: ``(R, m)``."""
    held, slots = limits["held"], triton.next_power_of_2(limits["window"])
    products = products_of(keys[:, None], keys[:, None])[:, 0]
    scale = keys.to(products.dtype).norm(dim=-1).reciprocal()
    sums = -torch.matmul(products[:, :held, :held], scale[:, :held, None])[..., 0] * scale[:, :held]
    marks, twins = marks_and_twins(keys)
    arguments = _arguments(limits, n, tokens.shape[1])
    _alike[(len(tokens),)](
        *(products, scale, sums.contiguous(), marks, twins, tokens, died),
        **arguments,
        **{"SLOTS": slots, "num_warps": _warps(slots)},
    )


def _arguments(limits: dict[str, int], n: int, m: int) -> dict[str, int]:
    return {**limits, "n": n, "m": m}


def _warps(numbers: int) -> int:
    return max(1, min(8, numbers // 128))


def _places(scores: Tensor) -> Tensor:
    """The place of each score among those of its row, float32, equal for equal ones: what is lower stays lower."""
    ordered, order = scores.sort(-1)
    places = torch.zeros_like(scores, dtype=torch.float32)
    places[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(-1)
    return torch.empty_like(places).scatter_(1, order, places)


def _bounds(scores: Tensor, extra: Tensor | None, held: int) -> tuple[Tensor, Tensor]:
    """The largest score of each row that has come, ``(R, G, n)``, and the power of the logit that joins its softmax."""
    *heads, n, m = scores.shape
    largest = scores.new_empty(*heads, n)
    _largest[(largest.numel(),)](scores, largest, held, n, m, BLOCK=1024, num_warps=4)
    if extra is None:
        return largest, torch.zeros_like(largest)
    largest = torch.maximum(largest, extra[..., None])
    return largest, torch.exp(extra[..., None] - largest)
