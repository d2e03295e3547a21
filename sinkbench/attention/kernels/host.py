"""The scans of the patterns, compiled for the processor by numba (``pip install sinkbench[fast]``).

Arrays: ``R`` heads of all streams (heads of keys and values), ``G`` query heads a group, ``n`` queries, ``m`` columns.
Each kernel keeps the columns that are alive in ``slots``, of which ``free`` is taken by the next token. Machine code is
kept on disk between processes, by numba.
"""

from collections.abc import Callable

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from sinkbench.attention.marks import marks_of
from sinkbench.positions.rotary import wide


@njit(cache=True, inline="always")
def _oldest_lowest(scores, tokens, slots, present, low_token, high_token, tolerance):
    """The slot with the lowest score; of equal ones, the oldest. Only tokens in ``[low_token, high_token)`` can go."""
    low = np.inf
    for s in range(present):
        token = tokens[slots[s]]
        if low_token <= token < high_token and scores[s] < low:
            low = scores[s]
    bound = low + tolerance * abs(low) if tolerance else low
    best, best_token = -1, np.int64(2**62)
    for s in range(present):
        token = tokens[slots[s]]
        if low_token <= token < high_token and token < best_token and (scores[s] <= bound or scores[s] == low):
            best, best_token = s, token
    if best >= 0:
        return best
    for s in range(present):  # not one number among them
        token = tokens[slots[s]]
        if low_token <= token < high_token and token < best_token:
            best, best_token = s, token
    return best


@njit(cache=True, parallel=True, nogil=True)
def _fixed(scores, tokens, died, held, first, n, window, sinks, recent, tolerance):
    """``scores``: of each column, ``(R, m)``."""
    for r in prange(tokens.shape[0]):
        slots = np.arange(window + 1)
        mine = np.empty(window + 1, scores.dtype)
        mine[:held] = scores[r, :held]
        free = held
        for i in range(n):
            now, present = first + i, min(first + i + 1, window + 1)
            slots[free], mine[free] = held + i, scores[r, held + i]
            if now < window:
                free = present
                continue
            free = _oldest_lowest(mine, tokens[r], slots, present, sinks, now + 1 - recent, tolerance)
            died[r, slots[free]] = i


@njit(cache=True, inline="always")
def _shares(powers, scores, extra, slots, present, out):
    """Add to ``out`` the softmax over the alive slots of one row.

    ``powers`` are those of the scores less the largest of the row, dead columns included; where all that is alive
    vanishes beside it, they are formed anew.
    """
    total = powers.dtype.type(0.0)
    for s in range(present):
        total += powers[slots[s]]
    if total + extra >= 1e-25:
        for s in range(present):
            out[s] += powers[slots[s]] / (total + extra)
        return
    largest = scores[slots[0]]
    for s in range(present):
        largest = max(largest, scores[slots[s]])
    total = powers.dtype.type(0.0)
    for s in range(present):
        total += np.exp(scores[slots[s]] - largest)
    for s in range(present):
        out[s] += np.exp(scores[slots[s]] - largest) / total


@njit(cache=True, parallel=True, nogil=True)
def _summed(powers, scores, extra, totals, tokens, died, held, first, window, sinks, recent, averaged):
    """``powers``, ``scores``: ``(R, G, n, m)``; ``extra``: ``(R, G, n)``; ``totals``: ``(R, m)``, changed in place."""
    groups, n = scores.shape[1], scores.shape[2]
    for r in prange(tokens.shape[0]):
        slots = np.arange(window + 1)
        mine = np.zeros(window + 1, totals.dtype)
        mine[:held] = totals[r, :held]
        new = np.empty(window + 1, totals.dtype)
        means = np.empty(window + 1, totals.dtype)
        free = held
        for i in range(n):
            now, present = first + i, min(first + i + 1, window + 1)
            slots[free], mine[free] = held + i, 0.0
            new[:present] = 0.0
            for g in range(groups):
                _shares(powers[r, g, i], scores[r, g, i], extra[r, g, i], slots, present, new)
            mine[:present] += new[:present]
            if now < window:
                free = present
                continue
            if averaged:
                for s in range(present):
                    means[s] = mine[s] / (now - tokens[r, slots[s]] + 1)
                free = _oldest_lowest(means, tokens[r], slots, present, sinks, now + 1 - recent, 0.0)
            else:
                free = _oldest_lowest(mine, tokens[r], slots, present, sinks, now + 1 - recent, 0.0)
            died[r, slots[free]] = i
        for s in range(min(first + n, window + 1)):
            totals[r, slots[s]] = mine[s]


@njit(cache=True, parallel=True, nogil=True)
def _newest(powers, scores, extra, tokens, died, held, first, window, sinks, recent):
    """Of ``B`` streams: ``powers``, ``scores``: ``(B, A, n, m)``, ``A`` all query heads; ``tokens``: ``(B, m)``."""
    heads, n = scores.shape[1], scores.shape[2]
    for b in prange(tokens.shape[0]):
        slots = np.arange(window + 1)
        mine = np.empty(window + 1, scores.dtype)
        free = held
        for i in range(n):
            now, present = first + i, min(first + i + 1, window + 1)
            slots[free] = held + i
            if now < window:
                free = present
                continue
            mine[:present] = 0.0
            for h in range(heads):
                _shares(powers[b, h, i], scores[b, h, i], extra[b, h, i], slots, present, mine)
            free = _oldest_lowest(mine, tokens[b], slots, present, sinks, now + 1 - recent, 0.0)
            died[b, slots[free]] = i


@njit(cache=True, parallel=True, nogil=True)
def _alike(products, marks, tokens, died, held, first, n, window, sinks, recent):
    """``products``: of the normalised keys with each other, ``(R, m, m)``; ``marks``: equal for equal keys, ``(R, m)``.

    An entry's score is its product with the sum of all that are alive, which gains and loses one row a token; it is
    carried in float64. Equal keys have equal scores, whatever rounding says: of those the oldest goes.
    """
    for r in prange(tokens.shape[0]):
        slots = np.arange(window + 1)
        sums = np.zeros(window + 1)
        for s in range(held):
            for other in range(held):
                sums[s] -= products[r, s, other]
        free = held
        for i in range(n):
            now, present, column = first + i, min(first + i + 1, window + 1), held + i
            slots[free], sums[free] = column, 0.0
            own = 0.0
            for s in range(present):
                product = np.float64(products[r, column, slots[s]])
                sums[s] -= product
                own -= product
            sums[free] = own
            if now < window:
                free = present
                continue
            high = now + 1 - recent
            best = _oldest_lowest(sums, tokens[r], slots, present, sinks, high, 0.0)
            free, mark = best, marks[r, slots[best]]
            for s in range(present):
                token = tokens[r, slots[s]]
                if marks[r, slots[s]] == mark and sinks <= token < high and token < tokens[r, slots[free]]:
                    free = s
            died[r, slots[free]] = i
            gone = slots[free]
            for s in range(present):
                sums[s] += products[r, gone, slots[s]]


def fixed(scores: Tensor, tokens: Tensor, died: Tensor, *, n: int, tolerance: float, **limits: int) -> None:
    """``scores``: of each column, ``(R, m)``, which never change; ``tokens``, ``died`` likewise."""
    _call(_fixed, scores.to(wide(scores.dtype)), tokens, died, n=n, tolerance=tolerance, **limits)


def summed(
    scores: Tensor, extra: Tensor | None, totals: Tensor, tokens: Tensor, died: Tensor, *, averaged: bool, **limits: int
) -> None:
    """``scores``: ``(R, G, n, m)``; ``extra``: a logit that joins each softmax, ``(R, G)``; ``totals`` change."""
    powers, also = _powers(scores, extra, limits["held"])
    _call(_summed, powers, scores, also, totals, tokens, died, averaged=averaged, **limits)


def newest(
    scores: Tensor, extra: Tensor | None, tokens: Tensor, died: Tensor, *, beside: int = 1, **limits: int
) -> None:
    """Of ``B`` streams: ``scores`` ``(B, A, n, m)``, ``A`` all query heads; ``tokens``, ``died`` ``(B, m)``."""
    powers, also = _powers(scores, extra, limits["held"])
    _call(_newest, powers, scores, also, tokens, died, **limits)


def alike(keys: Tensor, tokens: Tensor, died: Tensor, *, n: int, **limits: int) -> None:
    """``keys``: ``(R, m, D)``; ``tokens``, ``died``: ``(R, m)``."""
    marks, keys = marks_of(keys), keys.to(wide(keys.dtype))
    unit = keys / keys.norm(dim=-1, keepdim=True)
    _call(_alike, torch.matmul(unit, unit.transpose(-1, -2)), marks, tokens, died, n=n, **limits)


def _powers(scores: Tensor, extra: Tensor | None, held: int) -> tuple[Tensor, Tensor]:
    """The exponentials of scores less the largest that a query could see, and of the logit that joins its softmax."""
    n = scores.shape[2]
    later = torch.arange(-held, n)[None, : scores.shape[3]] > torch.arange(n)[:, None]
    largest = scores.masked_fill_(later, -torch.inf).amax(-1, keepdim=True)
    also = torch.zeros_like(largest[..., 0])
    if extra is not None:
        largest = torch.maximum(largest, extra[..., None, None])
        also = torch.exp(extra[..., None] - largest[..., 0])
    return torch.exp(scores - largest), also


def _call(kernel: Callable[..., None], *arrays: Tensor, **limits: int) -> None:
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    kernel(*(x.numpy() for x in arrays), **limits)
    if torch.get_num_threads() != threads:  # numba's first kernel tells OpenMP, and so torch, to use all cores
        torch.set_num_threads(threads)
