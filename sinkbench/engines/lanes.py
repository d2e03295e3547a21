"""Chunks of a stream that pass a model at once: each on a CUDA stream of its own, some layers behind the one before it.

A scan is one long chain of short steps in few programs, and alone it leaves most of a device idle. A layer of a chunk
waits for nothing of the chunk before but what the same layer has kept of it. So while a layer scans one chunk, the
layers before it scan those that follow: as many scans run beside each other as chunks are under way. What is computed
stays the same, to the last bit.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.attention.kernels import MEETING
from sinkbench.cache.scored import Lane, ScoredLayer
from sinkbench.cache.stream import StreamCache
from sinkbench.positions.bare import device_of

LANES = 4  # at most: a device takes no more launches in advance than those of a chunk or two
OVERLAP = 2  # at least, where there is memory: products of one chunk beside the scan of another


class Lanes:
    """Where the chunks of one cache go in turn.

    Chunks that all else has to wait for pass on the stream in use: the first, in which a cache makes room, and those
    before which streams leave it. That stream waits for every chunk, so whatever is asked of it finds them done.

    Attributes:
        count: chunks that are under way at once.
        streams: where they go; none where all pass on the one in use.
    """

    def __init__(self, device: torch.device, layers: Sequence[ScoredLayer], count: int) -> None:
        self.device, self.count, self._next = device, count, 0
        self.streams = [_stream(device, place) for place in range(count)] if count > 1 else []
        self._ready = torch.cuda.Event() if self.streams else None
        for layer in layers if self.streams else ():
            layer.lane = Lane(torch.cuda.Event(), count)

    @contextmanager
    def lane(self, alone: bool) -> Iterator[None]:
        """Within this context launches of a chunk go to the next lane, or, ``alone``, to the stream in use."""
        if self._ready is None:
            yield
            return
        here = torch.cuda.current_stream(self.device)
        if alone:
            yield
            self._ready.record(here)
            return
        lane = self.streams[self._next]
        self._next = (self._next + 1) % self.count
        lane.wait_event(self._ready)
        try:
            with torch.cuda.stream(lane):
                yield
        finally:  # also of a chunk that was broken off: memory that it writes to is soon another's
            here.wait_stream(lane)

    def handed(self, hidden: Tensor) -> Tensor:
        """``hidden``, made in a lane and read on the stream in use."""
        if self.streams:
            hidden.record_stream(torch.cuda.current_stream(self.device))
        return hidden


@functools.cache
def _stream(device: torch.device, place: int) -> torch.cuda.Stream:
    """That of a lane, the same for all caches: torch keeps freed memory for the stream that had it."""
    return torch.cuda.Stream(device)


def lanes_for(model: PreTrainedModel, cache: StreamCache, rows: int, room: int, scans: int = 1) -> Lanes:
    """Lanes for ``rows`` streams side by side; there is memory for ``room`` of their chunks at once.

    A single one where layers are not all scored, as what others hold moves in memory; where evictions are noted,
    which are read from the device in between; and where ``scans``, of so many caches in turns, are those of several: of
    programs that wait for each other all must be running, whatever else does.
    """
    device = device_of(model)
    layers = [layer for layer in cache.layers if isinstance(layer, ScoredLayer) and layer.trace is None]
    apart = len(layers) < len(cache.layers) or any(weight.device != device for weight in model.parameters())
    if device.type != "cuda" or apart or scans > 1:
        return Lanes(device, [], 1)
    heads = max(layer.sizes.kv_heads for layer in cache.plan.kept)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Lanes(device, layers, lanes_of(processors, rows, heads, room))


def lanes_of(processors: int, rows: int, heads: int, room: int) -> int:
    """How many lanes a cache gets of so many multiprocessors, for scans of ``rows`` streams and ``heads`` of keys."""
    most = processors // MEETING  # programs that meet must all be running
    return max(1, min(LANES, most, room, max(OVERLAP, processors // (rows * max(MEETING, heads)))))
