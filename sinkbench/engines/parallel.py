"""Many tokens a forward, with the NLLs of the stepwise engine; many independent streams side by side.

Streams are read in chunks; between chunks the cache carries what the plan keeps, so memory does not depend on the
length of a stream (for dense attention it grows by the cache alone). Of several streams a batch passes at once, at one
position: each has rows of its own in every product, scan and softmax, and says what it says alone.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.held import bytes_held
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.trace import Trace
from sinkbench.engines.batches import batches, pieces
from sinkbench.engines.chunks import Room, hidden_states, refuses_plan
from sinkbench.engines.compiling import compiled_parts
from sinkbench.engines.head import nll_of
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.positions.detection import check_reach
from sinkbench.strategies import Plan

COMPILE_FROM = 50_000  # tokens: shorter streams end before compilation pays
SHAPES = 4  # of forwards, at most, for each of which parts of the model are compiled


@dataclass(frozen=True)
class Parallel:
    """Many tokens a forward.

    Attributes:
        chunk: tokens of a stream a forward; by default chosen from the free memory.
        compiled: whether parts of the model run compiled, on CUDA; by default where there are tokens enough.
        side_by_side: streams a forward, at most; by default chosen from the free memory.
    """

    model: PreTrainedModel
    chunk: int | None = None
    compiled: bool | None = None
    side_by_side: int | None = None

    def refuses(self, plan: Plan) -> str | None:
        return "no cache is carried: each token is read afresh" if plan.context is not None else refuses_plan(plan)

    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`; chunks lie as they would without ``start``."""
        return (steps for _, steps in self.run_many(plan, [tokens], start=start, trace=trace))

    @torch.inference_mode()
    def run_many(
        self, plan: Plan, streams: Sequence[Tensor], first: int = 0, start: int = 0, trace: Trace | None = None
    ) -> Iterator[tuple[int, Steps]]:
        """As :func:`sinkbench.engines.streams.run_many`; batches are those that they would be without ``first``.

        Args:
            trace: takes note of what is evicted of a single stream.
        """
        model, lengths = self.model, [max(0, len(stream) - 1) for stream in streams]
        if plan.dense:
            check_reach(model, max(lengths, default=0))
        room = Room.of(model, plan)
        chunk = self.chunk or room.chunk

        def fits(length: int) -> int:
            return self.side_by_side or room.streams(plan, model.dtype.itemsize, chunk, length)

        groups = [group for group in batches(lengths, fits) if max(group) >= first]
        shapes = {(p.rows, p.end - p.begin) for g in groups for p in pieces([lengths[i] for i in g], chunk)}
        worth_it = sum(lengths) >= COMPILE_FROM and len(shapes) <= SHAPES
        with compiled_parts(model, worth_it if self.compiled is None else self.compiled):
            parts = (
                part for group in groups for part in self._batch(plan, streams, group, (first, start), chunk, trace)
            )
            yield from _in_order(parts, lengths, first, start)

    def _batch(
        self,
        plan: Plan,
        streams: Sequence[Tensor],
        group: Sequence[int],
        begin: tuple[int, int],
        chunk: int,
        trace: Trace | None,
    ) -> Iterator[tuple[int, Steps]]:
        """The streams of ``group``, mixed, each in its order, from the stream and the row of ``begin`` on."""
        model, waiting = self.model, None
        tokens = [streams[index].to(model.device) for index in group]
        cache = StreamCache(model, plan, trace)
        for piece, hidden in hidden_states(model, cache, [mine[:-1] for mine in tokens], chunk):
            wanted = []  # of which stream which of its rows in this piece
            for row, index in enumerate(group[: piece.rows]):
                skipped = begin[1] if index == begin[0] else 0 if index > begin[0] else len(tokens[row])
                rows = range(max(piece.begin, skipped), min(piece.end, len(tokens[row]) - 1))
                if rows:
                    wanted.append((row, rows))
            if not wanted:
                continue
            of_rows = [hidden[row, rows.start - piece.begin : rows.stop - piece.begin] for row, rows in wanted]
            labels = [tokens[row][rows.start + 1 : rows.stop + 1] for row, rows in wanted]
            nll = nll_of(model, torch.cat(of_rows), torch.cat(labels))
            held = bytes_held(plan, cache.itemsize, np.arange(piece.begin + 1, piece.end + 1)).tolist()
            parts = [
                Part(group[row], rows.start + 1, held[rows.start - piece.begin : rows.stop - piece.begin])
                for row, rows in wanted
            ]
            begun = Pending(nll, parts)
            if waiting:  # the device is busy with the next chunk while this one is written down
                yield from waiting.steps()
            waiting = begun
        if waiting:
            yield from waiting.steps()


def _in_order(
    parts: Iterator[tuple[int, Steps]], lengths: Sequence[int], stream: int, row: int
) -> Iterator[tuple[int, Steps]]:
    """``parts`` stream after stream, from one stream and one of its rows on; those that come early wait."""
    early: defaultdict[int, list[Steps]] = defaultdict(list)
    for index, steps in parts:
        early[index].append(steps)
        while stream < len(lengths):
            for ready in early.pop(stream, []):
                row += len(ready.nll)
                yield stream, ready
            if row < lengths[stream]:
                break
            stream, row = stream + 1, 0


@dataclass(frozen=True)
class Part:
    """Rows of one stream among those of a piece: from which on, and what is held after each."""

    stream: int
    first: int
    kv_cache_bytes: list[int]


class Pending:
    """NLLs on their way from the device."""

    def __init__(self, nll: Tensor, parts: list[Part]) -> None:
        self.parts, self.vram = parts, vram_allocated()
        self.event = torch.cuda.Event() if nll.is_cuda else None
        self.nll = nll.to("cpu", non_blocking=True) if not self.event else self._copied(nll)

    def _copied(self, nll: Tensor) -> Tensor:
        here = torch.empty(nll.shape, dtype=nll.dtype, pin_memory=True).copy_(nll, non_blocking=True)
        assert self.event is not None
        self.event.record()
        return here

    def steps(self) -> Iterator[tuple[int, Steps]]:
        """Wait until they are here; of each stream its index and its steps."""
        if self.event:
            self.event.synchronize()
        nll = iter(self.nll.tolist())
        for part in self.parts:
            own = list(islice(nll, len(part.kv_cache_bytes)))
            yield part.stream, Steps(part.first, own, None, self.vram, part.kv_cache_bytes)
