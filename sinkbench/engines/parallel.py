"""Many tokens a forward, with the NLLs of the stepwise engine; many independent streams side by side.

Streams are read in chunks; between chunks the cache carries what the plan keeps, so memory does not depend on the
length of a stream (for dense attention it grows by the cache alone). Of several streams a batch passes at once, at one
position: each has rows of its own in every product, scan and softmax, and says what it says alone.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.held import bytes_held
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.trace import Trace
from sinkbench.calls import NOTHING
from sinkbench.compilers import INTERPRETED, compilable
from sinkbench.engines.batches import Piece, batches
from sinkbench.engines.chunks import Room, chunk_for, refuses_plan, states_of
from sinkbench.engines.divergence import Measured
from sinkbench.engines.fresh import fresh_states
from sinkbench.engines.head import measured
from sinkbench.engines.states import States, behind, together
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import check_reach
from sinkbench.positions.exact import exact_angles
from sinkbench.positions.families import lasting
from sinkbench.strategies import Plan
from sinkbench.validation import MOST


@dataclass(frozen=True)
class Parallel:
    """Many tokens a forward.

    Attributes:
        chunk: tokens of a stream a forward; by default chosen from the free memory.
        side_by_side: streams a forward, at most; by default chosen from the free memory.
        reference: the plan to diverge from; ``None`` for none.
        until: tokens of a stream that it reads; ``None`` for all. Behind them nothing is measured against it.
    """

    model: PreTrainedModel
    chunk: int | None = None
    side_by_side: int | None = None
    reference: Plan | None = None
    until: int | None = None

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
        if self.reference is not None and self.reference.context is not None:
            with quick_parts(model):
                for index in range(first, len(streams)):
                    begin = start if index == first else 0
                    steps = many_a_step(
                        *(model, plan, streams[index], begin, trace, self.reference, self.until, self.chunk)
                    )
                    yield from ((index, one) for one in steps)
            return
        plans = [plan] if self.reference is None else [plan, self.reference]
        for one, end in zip(plans, (None, self.until), strict=False):
            if one.dense:
                check_reach(model, min(max(lengths, default=0), end or MOST))
        rooms = [Room.of(model, one) for one in plans]
        chunk = self.chunk or min(room.chunk for room in rooms)  # one for both: of itself a plan diverges nowhere

        def fits(length: int) -> int:
            asked = model.dtype.itemsize, chunk, length, len(plans)
            each = zip(rooms, plans, strict=True)
            return self.side_by_side or min(room.streams(one, *asked) for room, one in each)

        groups = [group for group in batches(lengths, fits) if max(group) >= first]
        with quick_parts(model):
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
        model, waiting, until = self.model, deque[Pending](), MOST if self.until is None else self.until
        tokens = [streams[index].to(device_of(model)) for index in group]
        fed = [mine[:-1] for mine in tokens]
        caches = [StreamCache(model, plan, trace), *([StreamCache(model, self.reference)] if self.reference else [])]
        chunk = min(cache.reach.chunk(chunk) for cache in caches)
        scans = sum(cache.plan.by_score for cache in caches)
        read = [states_of(model, cache, fed, chunk, scans) for cache in caches]
        at_once = max(states.at_once for states in read)
        with lasting(model, max(states.longest for states in read)), exact_angles(model):
            for piece, *of_each in _beside(until, *(states.read for states in read)):
                wanted = []  # of which stream which of its rows in this piece
                for row, index in enumerate(group[: piece.rows]):
                    skipped = begin[1] if index == begin[0] else 0 if index > begin[0] else len(tokens[row])
                    rows = range(max(piece.begin, skipped), min(piece.end, len(tokens[row]) - 1))
                    if rows:
                        wanted.append((row, rows))
                if not wanted:
                    continue
                of_rows = [
                    torch.cat([x[row, rows.start - piece.begin : rows.stop - piece.begin] for row, rows in wanted])
                    for x in of_each
                ]
                labels = [tokens[row][rows.start + 1 : rows.stop + 1] for row, rows in wanted]
                found = measured(model, of_rows[0], torch.cat(labels), of_rows[1] if len(of_rows) > 1 else None)
                held = bytes_held(plan, model.dtype.itemsize, np.arange(piece.begin + 1, piece.end + 1)).tolist()
                parts = [
                    Part(group[row], rows.start + 1, held[rows.start - piece.begin : rows.stop - piece.begin], until)
                    for row, rows in wanted
                ]
                waiting.append(Pending(found, parts))
                while waiting and (len(waiting) > at_once or waiting[0].is_here()):
                    # the device is busy with those that follow
                    yield from waiting.popleft().steps()
            while waiting:
                yield from waiting.popleft().steps()


def quick_parts(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Within this context, parts of ``model`` take many tokens in few launches, where Triton runs on its device."""
    triton = device_of(model).type == "cuda" or INTERPRETED
    many = compilable("sinkbench.engines.many.parts") if triton and model.dtype != torch.float64 else None
    return NOTHING if many is None else many.many_parts(model)


def _beside(
    until: int, own: Iterator[tuple[Piece, Tensor]], beside: Iterator[tuple[Piece, Tensor]] | None = None
) -> Iterator[tuple[Piece, *tuple[Tensor, ...]]]:
    """Each piece, its states, and those of a reference, if any, up to the piece with token ``until``."""
    for piece, hidden in own:
        if piece.begin >= until:
            beside = None  # and its cache
        yield (piece, hidden) if beside is None else (piece, hidden, next(beside)[1])


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
    """Rows of one stream among those of a piece: from which on, what is held after each, and up to which a reference
    counts."""

    stream: int
    first: int
    kv_cache_bytes: list[int]
    until: int = MOST


class Pending:
    """What was measured, on its way from the device."""

    def __init__(self, found: Measured, parts: list[Part]) -> None:
        self.parts, self.vram = parts, vram_allocated()
        self.event = torch.cuda.Event() if found["nll"].is_cuda else None
        self.found = {name: self._copied(values) if self.event else values.cpu() for name, values in found.items()}
        if self.event:
            self.event.record()

    def _copied(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def is_here(self) -> bool:
        """Whether nothing has to be waited for."""
        return self.event is None or self.event.query()

    def steps(self) -> Iterator[tuple[int, Steps]]:
        """Wait until it is here; of each stream its index and its steps."""
        if self.event:
            self.event.synchronize()
        values = {name: iter(of_all.tolist()) for name, of_all in self.found.items()}
        for part in self.parts:
            count = len(part.kv_cache_bytes)
            own = {name: list(islice(of_all, count)) for name, of_all in values.items()}
            nll, counts = own.pop("nll"), max(0, min(count, part.until + 1 - part.first))
            columns = {name: column[:counts] + [None] * (count - counts) for name, column in own.items()}
            yield part.stream, Steps(part.first, nll, None, self.vram, part.kv_cache_bytes, columns)


def many_a_step(
    model: PreTrainedModel,
    plan: Plan,
    tokens: Tensor,
    start: int,
    trace: Trace | None,
    reference: Plan | None,
    until: int | None,
    chunk: int | None,
) -> Iterator[Steps]:
    """As :meth:`Engine.run`, many tokens a forward, where the plan or the reference carries no cache."""
    tokens = tokens.to(device_of(model))
    if reference is not None and chunk is None:
        chunk = min(chunk_for(model, plan), chunk_for(model, reference))
    own = _of_one(model, plan, tokens[:-1], start, chunk, trace)
    end = len(tokens) - 1 if until is None else min(until, len(tokens) - 1)
    beside = None if reference is None or start >= end else _of_one(model, reference, tokens[:end], start, chunk)
    with lasting(model, own.longest if beside is None else max(own.longest, beside.longest)), exact_angles(model):
        alone = ((*piece, None) for piece in behind(start, own.read))
        both = None if beside is None else together(behind(start, own.read), behind(start, beside.read), end)
        for first, hidden, other in alone if both is None else both:
            end = first + len(hidden)
            found = measured(model, hidden, tokens[first + 1 : end + 1], other)
            held = [0] * len(hidden)
            if plan.context is None:
                held = bytes_held(plan, model.dtype.itemsize, np.arange(first + 1, end + 1)).tolist()
            yield from (steps for _, steps in Pending(found, [Part(0, first + 1, held)]).steps())


def _of_one(
    model: PreTrainedModel, plan: Plan, tokens: Tensor, start: int, chunk: int | None, trace: Trace | None = None
) -> States[int]:
    """States of one stream, ``(n, width)``, by where each piece begins."""
    if plan.context is not None:
        return fresh_states(model, plan.context, tokens, start, chunk)
    if plan.dense:
        check_reach(model, len(tokens))
    states = states_of(model, StreamCache(model, plan, trace), [tokens], chunk)
    return States(states.longest, ((piece.begin, hidden[0]) for piece, hidden in states.read))
