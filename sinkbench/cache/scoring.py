"""A score is asked for, and what comes back is looked at: a strategy may be somebody's own."""

import torch
from torch import Tensor

from sinkbench.errors import UserError
from sinkbench.strategies import Eviction, Held
from sinkbench.strategies.checks import in_a_line


def scores_of(eviction: Eviction, held: Held) -> Tensor:
    """As :meth:`Eviction.score`: ``(B, H, n)``, or ``(B, 1, n)`` for all heads.

    Raises:
        UserError: one line with the token at which it failed, or answered with something else. What cannot be is seen
            at the first token, before a row is written.
    """
    name = type(eviction).__name__
    try:
        scores = eviction.score(held)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"the score of {name} failed at token {held.now}: {in_a_line(error)}") from error
    wrong = _wrong(eviction, held, scores)
    if wrong:
        raise UserError(f"the score of {name} at token {held.now} must be {wrong}")
    return scores


def _wrong(eviction: Eviction, held: Held, scores: object) -> str | None:
    batch, heads, n = held.tokens.shape
    if not isinstance(scores, Tensor):
        return f"a tensor, a number for each entry (got {type(scores).__name__})"
    shapes = [(batch, 1, n)] if eviction.choice == "layer" else [(batch, heads, n), (batch, 1, n)]
    if tuple(scores.shape) not in shapes:
        whose = "of the layer" if eviction.choice == "layer" else "of each head"
        return f"a number {whose} for each entry, of shape {shapes[0]} (got {tuple(scores.shape)})"
    if not scores.is_floating_point():
        return f"of floating point (got {str(scores.dtype).removeprefix('torch.')})"
    if scores.device != held.tokens.device:
        return f"on {held.tokens.device}, where the entries are (got {scores.device})"
    # those with a pattern are known: a look at each number would make a device wait at every layer of every step
    if eviction.pattern is None and bool(scores.isnan().any()):
        return "numbers that can be compared (got nan)"
    return None
