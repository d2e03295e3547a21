"""The one part of a chunk that is sequential: which entry goes at which token.

With ``text`` positions a score of a query and a key does not depend on what was evicted. So all of them can be formed
first, and the choice of what goes is a scan over their rows that reads no value.
"""

import torch
from torch import Tensor

from sinkbench.attention.patterns import by_pattern
from sinkbench.attention.rows import Rows
from sinkbench.attention.scores import shares_of
from sinkbench.cache.columns import along
from sinkbench.cache.lowest import lowest
from sinkbench.cache.scoring import scores_of
from sinkbench.strategies import Held


def scan(rows: Rows) -> Tensor:
    """When each column dies: the index in the chunk of the last query that attends to it, int64, ``(B, H, m)``.

    The number of queries for those that are held after the chunk.
    """
    died = by_pattern(rows)
    return step_by_step(rows) if died is None else died


def step_by_step(rows: Rows) -> Tensor:
    """The scan of any strategy: its own score is asked at every step."""
    policy, eviction, window, n = rows.policy, rows.eviction, rows.window, rows.n
    died = torch.full_like(rows.tokens, n)
    slots = Slots(rows, window + 1)
    for i in range(n):
        now, present = rows.first + i, min(rows.first + i + 1, window + 1)
        slots.come(rows.held + i, now)
        scores = scores_of(eviction, slots.view(i, now, present))
        if now < window:
            slots.free.fill_(present)
            continue
        slots.free = lowest(scores, slots.tokens, policy.sinks, now + 1 - policy.protected, now, eviction.tolerance)
        died.scatter_(2, slots.columns.gather(2, slots.free), i)
    slots.remember()
    return died


class Slots:
    """What is held during a chunk: in each slot one column; one that goes leaves its slot to the next."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows = rows
        self.columns = torch.arange(size, device=rows.tokens.device).expand(*rows.tokens.shape[:2], -1).clone()
        self.tokens = _padded(rows.tokens[:, :, : rows.held], size)
        self.memory = {name: _padded(x[:, :, : rows.held], size) for name, x in rows.memory.items()}
        self.free = torch.full((*rows.tokens.shape[:2], 1), rows.held, device=rows.tokens.device)

    def come(self, column: int, token: int) -> None:
        """The next token takes the free slot."""
        self.columns.scatter_(2, self.free, column)
        self.tokens.scatter_(2, self.free, token)
        for numbers in self.memory.values():
            numbers.scatter_(2, self.free, 0.0)

    def view(self, i: int, now: int, present: int) -> Held:
        """What a score sees at query ``i``."""
        rows, columns = self.rows, self.columns[:, :, :present]

        def look() -> Tensor:
            row = rows.scores[:, :, :, i]
            return shares_of(row.gather(3, columns[:, :, None].expand(-1, -1, row.shape[2], -1)), rows.extra)

        return Held(
            tokens=self.tokens[:, :, :present],
            now=now,
            memory={name: numbers[:, :, :present] for name, numbers in self.memory.items()},
            layer=rows.layer,
            look=look,
            keys_of=lambda: rows.keys.gather(2, along(columns, rows.keys)),
        )

    def remember(self) -> None:
        """Write what is carried to the columns; a free slot's to a column that is dead."""
        present = min(self.rows.first + self.rows.n, self.tokens.shape[2])
        for name, numbers in self.memory.items():
            self.rows.memory[name].scatter_(2, self.columns[:, :, :present], numbers[:, :, :present])


def _padded(x: Tensor, size: int) -> Tensor:
    return torch.cat((x, x.new_zeros(*x.shape[:2], size - x.shape[2])), 2)
