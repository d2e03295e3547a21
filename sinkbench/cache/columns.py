"""The columns of a chunk: what is held, then its own tokens; and what of them is held after it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkbench.compilers import by_program


@dataclass
class Columns:
    """Entries of a layer. Those that the queries of a chunk may attend to are what was held before it, then its own
    tokens.

    Attributes:
        keys: ``(B, H, m, D)``; ``values`` likewise.
        tokens: index in the text of each, int64, ``(B, H, m)``.
        memory: what the strategy carries for each, ``(B, H, m)``.
        held: how many were held before, or, of slots, are to be held; the same in every head.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    memory: dict[str, Tensor]
    held: int


def join(slots: Columns, keys: Tensor, values: Tensor, first: int) -> Columns:
    """What ``slots`` hold, and behind it the ``keys`` and ``values``, ``(B, H, n, D)``, of tokens from ``first`` on."""
    joined: Columns | None = by_program(keys, "sinkbench.cache.kernels.columns.join", slots, keys, values, first)
    if joined is not None:
        return joined
    held, n = slots.held, keys.shape[2]
    new = torch.arange(first, first + n, device=keys.device).expand(*keys.shape[:2], -1)
    memory = {name: torch.cat((x[:, :, :held], x.new_zeros(new.shape)), 2) for name, x in slots.memory.items()}
    return Columns(
        torch.cat((slots.keys[:, :, :held], keys), 2),
        torch.cat((slots.values[:, :, :held], values), 2),
        torch.cat((slots.tokens[:, :, :held], new), 2),
        memory,
        held,
    )


def keep(columns: Columns, died: Tensor, slots: Columns) -> None:
    """Fill the first of the ``slots``, as many as are held, with the columns that are alive, in their order.

    Args:
        died: for each column the index in the chunk of the last query that attends to it, int64, ``(B, H, m)``; the
            number of queries for those that are alive.
    """
    if by_program(died, "sinkbench.cache.kernels.columns.keep", columns, died, slots) is not None:
        return
    n, held = columns.tokens.shape[2] - columns.held, slots.held
    alive = torch.sort((died < n).to(torch.int8), stable=True).indices[:, :, :held]
    slots.keys[:, :, :held] = columns.keys.gather(2, along(alive, columns.keys))
    slots.values[:, :, :held] = columns.values.gather(2, along(alive, columns.values))
    slots.tokens[:, :, :held] = columns.tokens.gather(2, alive)
    for name, numbers in columns.memory.items():
        slots.memory[name][:, :, :held] = numbers.gather(2, alive)


def along(index: Tensor, x: Tensor) -> Tensor:
    """``index``, ``(B, H, n)``, for gathering from ``x``, ``(B, H, m)`` or ``(B, H, m, D)``."""
    return index if x.dim() == 3 else index[..., None].expand(-1, -1, -1, x.shape[-1])
