"""Token by token as one captured CUDA graph a step: the same numbers, at the speed of memory."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.cache.held import bytes_held
from sinkbench.cache.trace import Trace
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.replay import CapturedStream
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.engines.stepwise import Stepwise
from sinkbench.positions.families import family_of, takes_positions
from sinkbench.strategies import Plan

# Steps times layers from which our kernels save more than the seconds in which they are made ready (results/h200).
QUICK_FROM = 40_000


@dataclass(frozen=True)
class Captured:
    """Steps as replays of one captured graph, on CUDA.

    Attributes:
        quick: whether parts of the model run on kernels of ours; by default where the stream is long enough.
        note: is called with a line where a step cannot be captured, and the plain way is taken.
        stage: is called with what goes on before the first step.
    """

    model: PreTrainedModel
    quick: bool | None = None
    note: Callable[[str], None] = lambda line: None
    stage: Callable[[str], None] = lambda what: None

    def refuses(self, plan: Plan) -> str | None:
        model = self.model
        if model.device.type != "cuda":
            return "steps are captured on CUDA only"
        if len({p.device for p in model.parameters()}) > 1:
            return "the model is spread over several devices"
        return refuses_rings(model, plan)

    def run(self, plan: Plan, tokens: Tensor, start: int = 0, trace: Trace | None = None) -> Iterator[Steps]:
        """As :meth:`Engine.run`. Capture, growth and moving back are not part of any step's latency."""
        return (steps for _, steps in self.run_many(plan, [tokens], start=start, trace=trace))

    @torch.no_grad()
    def run_many(
        self, plan: Plan, streams: Sequence[Tensor], first: int = 0, start: int = 0, trace: Trace | None = None
    ) -> Iterator[tuple[int, Steps]]:
        """As :func:`sinkbench.engines.streams.run_many`: one after the other, by one graph."""
        if first >= len(streams):
            return
        length = sum(map(len, streams))
        quick = length * len(plan.layers) >= QUICK_FROM if self.quick is None else self.quick
        self.stage("capturing" if not start else "reading what was read before")
        stream = CapturedStream(self.model, plan, max(streams, key=len).clone(), quick)
        stream.restart(streams[first])
        if start:
            stream.prime(prefilled(self.model, plan, streams[first][:start], trace))
            self.stage("capturing")
        with stream:
            left = yield from replayed(stream, streams, first, start)
        if left is not None:
            del stream
            name = type(self.model).__name__
            self.note(f"a step of {name} cannot be captured as a CUDA graph ({left.reason}): taking the plain way")
            for later in range(left.index, len(streams)):
                begin = left.begin if later == left.index else 0
                for steps in Stepwise(self.model).run(plan, streams[later], begin, trace):
                    yield later, steps


@dataclass(frozen=True)
class Left:
    """Where streams are left, as a step cannot be captured: that from token ``begin`` of stream ``index``."""

    index: int
    begin: int
    reason: str


def replayed(
    stream: CapturedStream, streams: Sequence[Tensor], first: int, start: int
) -> Generator[tuple[int, Steps], None, Left | None]:
    """As :func:`sinkbench.engines.streams.run_many`, by the graphs of ``stream``.

    While the device takes a step, the one before it is handed on: what others do with it costs no time.
    """
    before: tuple[int, int, float, float] | None = None
    for index in range(first, len(streams)):
        if index > first:
            if before is not None:
                yield _handed_on(stream, *before)
                before = None
            stream.restart(streams[index])
        for t in range(start if index == first else 0, len(streams[index]) - 1):
            if not stream.ready:
                if before is not None:
                    yield _handed_on(stream, *before)  # what is to be prepared may fail, and need memory
                    before = None
                reason = stream.prepared()
                if reason is not None:
                    return Left(index, t, reason)
            stream.launch()
            if before is not None:
                yield _handed_on(stream, *before)
            before = index, t + 1, *stream.ended()
    if before is not None:
        yield _handed_on(stream, *before)
    return None


def _handed_on(stream: CapturedStream, index: int, fed: int, nll: float, latency: float) -> tuple[int, Steps]:
    held = int(bytes_held(stream.plan, stream.model.dtype.itemsize, fed))
    return index, Steps(fed, [nll], latency, vram_allocated(), [held])


def refuses_rings(model: PreTrainedModel, plan: Plan) -> str | None:
    """Why the keys and values of ``plan`` cannot live in rings, whatever the device; ``None`` where they can."""
    placed = takes_positions(model) or family_of(model).alibi is not None
    reasons = {
        "no cache is carried: each token is read afresh": plan.context is not None,
        "entries that go by a score, and layers that carry a state, are not captured": plan.by_score or plan.stateful,
        "keys and values in a format of their own are not captured": not plan.as_computed,
        "8-bit products ask the host in the middle of a step": getattr(model, "is_loaded_in_8bit", False),
        "the model's forward cannot be given positions": not placed,
        "rotary frequencies that change with the length are chosen on the host": _asks_host(model),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _asks_host(model: PreTrainedModel) -> bool:
    """Whether a rotary module of ``model`` looks at the positions to choose its frequencies."""
    kinds = [getattr(module, "rope_type", "default") for module in model.modules()]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names)
