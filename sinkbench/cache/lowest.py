"""Which entry goes: of those that can, the one with the lowest score; of equal ones, the oldest."""

import torch
from torch import Tensor


def lowest(scores: Tensor, tokens: Tensor, first: int, last: int, now: int, tolerance: float = 0.0) -> Tensor:
    """Where the entry with the lowest score lies, ``(B, H, 1)``; of equal ones, the oldest.

    Args:
        scores: ``(B, H, n)``, or ``(B, 1, n)`` for all heads.
        tokens: indices in the text, ``(B, H, n)``; only those from ``first`` on and before ``last`` can go.
        now: the index of the newest.
        tolerance: scores above the lowest by no more than this share of its magnitude are equal to it.
    """
    if first == 0 and last > now:
        return _oldest_lowest(scores.expand(tokens.shape), tokens, tolerance)
    stays = tokens >= last
    if first:
        stays |= tokens < first
    most = torch.iinfo(torch.long).max
    return _oldest_lowest(scores.masked_fill(stays, torch.inf), tokens.masked_fill(stays, most), tolerance)


def _oldest_lowest(scores: Tensor, tokens: Tensor, tolerance: float) -> Tensor:
    low = scores.amin(-1, keepdim=True)
    if tolerance:
        low = torch.fmax(low, torch.add(low, low.abs(), alpha=tolerance))  # an infinite lowest has no neighbours
    return tokens.masked_fill(scores > low, torch.iinfo(torch.long).max).argmin(-1, keepdim=True)
