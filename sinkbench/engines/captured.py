"""Token by token as one captured CUDA graph a step: the same numbers, at the speed of memory.

A step reads its token, its label and its positions from device memory and advances the counters itself, so a replay
needs nothing from the host. Keys and values live in rings (:mod:`sinkbench.attention.kernels.ring`); the model's own
forward, compiled, does the rest. Positions are kept small by moving the rings' keys back now and then, between replays.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinkbench.attention.kernels.ring import Ring, attend_ring
from sinkbench.attention.redirection import redirected
from sinkbench.cache.held import bytes_held
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import BLOCK, StripLayer
from sinkbench.cache.trace import Trace
from sinkbench.engines.head import loss
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError
from sinkbench.positions.families import family_of, lasting, takes_positions
from sinkbench.positions.reach import UNBOUNDED
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Plan

WARM_UPS = 3
REACH = 8192  # positions at which the rings' keys are moved back, beyond twice the window
# Products of a matrix with one vector are bound by memory; inductor's reductions, tuned, come closer to it than cuBLAS.
COMPILE = {"coordinate_descent_tuning": True}


@dataclass(frozen=True)
class Captured:
    """Steps as replays of one captured graph, on CUDA.

    Attributes:
        compiled: whether the model's forward is compiled before it is captured.
        note: is called with a line where a step cannot be captured, and the plain way is taken.
    """

    model: PreTrainedModel
    compiled: bool = True
    note: Callable[[str], None] = lambda line: None

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
        t, index, reason = start, first, None
        stream = CapturedStream(self.model, plan, max(streams, key=len).clone(), self.compiled)
        stream.restart(streams[first])
        if start:
            stream.prime(prefilled(self.model, plan, streams[first][:start], trace))
        with stream:
            for index in range(first, len(streams)):
                if index > first:
                    stream.restart(streams[index])
                for t in range(start if index == first else 0, len(streams[index]) - 1):
                    reason = stream.prepared()
                    if reason is not None:
                        break
                    torch.cuda.synchronize()
                    begin = time.perf_counter()
                    nll = stream.step()
                    latency = time.perf_counter() - begin
                    yield index, Steps(t + 1, [nll], latency, vram_allocated(), [stream.kv_cache_bytes()])
                if reason is not None:
                    break
        if reason is not None:
            del stream
            name = type(self.model).__name__
            self.note(f"a step of {name} cannot be captured as a CUDA graph ({reason}): taking the plain way")
            for later in range(index, len(streams)):
                for steps in Stepwise(self.model).run(plan, streams[later], t if later == index else 0, trace):
                    yield later, steps


def refuses_rings(model: PreTrainedModel, plan: Plan) -> str | None:
    """Why the keys and values of ``plan`` cannot live in rings, whatever the device; ``None`` where they can."""
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    reasons = {
        "no cache is carried: each token is read afresh": plan.context is not None,
        "entries that go by a score, and layers that carry a state, are not captured": plan.by_score or plan.stateful,
        "keys and values in a format of their own are not captured": not plan.as_computed,
        "scores with a cap, terms or a logit of their own are not captured": capped or family_of(model).alibi,
        "8-bit products ask the host in the middle of a step": getattr(model, "is_loaded_in_8bit", False),
        "the model's forward cannot be given positions": not takes_positions(model),
        "rotary frequencies that change with the length are chosen on the host": _asks_host(model),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _asks_host(model: PreTrainedModel) -> bool:
    """Whether a rotary module of ``model`` looks at the positions to choose its frequencies."""
    kinds = [getattr(module, "rope_type", "default") for module in model.modules()]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names)


class _PassThrough(Cache):
    """Hands new keys and values on as they are: the rings are written by the attention."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass
class Turns:
    """The rotations by which a step's queries meet the sinks, of all layers with one rope: a row a way of counting.

    Attributes:
        ways: by which policy, or by the text, a row counts where the query stands.
        rotation: ``(len(ways), D)``; rings hold views of its rows.
    """

    rope: Rope
    ways: list[Any]
    rotation: Rotation


class CapturedStream:
    """A model, a plan and a stream, set up for replay.

    Args:
        compiled: whether the model's forward is compiled before it is captured.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, tokens: Tensor, compiled: bool = True) -> None:
        self.model, self.plan, self.device = model, plan, model.device
        self.tokens = tokens.to(self.device)
        self.counter = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.nll = torch.zeros((), device=self.device, dtype=torch.promote_types(model.dtype, torch.float32))
        self.cache = _PassThrough()
        cache = StreamCache(model, plan)
        self.layers = [layer for layer in cache.kept if isinstance(layer, StripLayer)]
        self.fed = self.at = 0  # host mirrors of the counter and the position
        self.turns: list[Turns] = []
        self.rings = [self._ring(layer) for layer in self.layers]
        window = plan.longest
        self.reach = UNBOUNDED if window is None or cache.reach.fixed else max(REACH, 2 * window)
        # the rings that grow; none in a dense model whose layers all have a window of their own
        self.growing = [r for r, layer in zip(self.rings, self.layers, strict=True) if layer.policy.window is None]
        for ring in self.growing:
            _mark(ring)
        forward = model.forward
        self.forward = torch.compile(forward, dynamic=False, options=dict(COMPILE)) if compiled else forward
        self.turn = torch.compile(self._turn, dynamic=False) if compiled else self._turn
        self.graph: torch.cuda.CUDAGraph | None = None

    def _ring(self, layer: StripLayer) -> Ring:
        sizes, policy, dtype = layer.plan.sizes, layer.policy, self.model.dtype
        capacity = BLOCK if policy.window is None else policy.window + 1
        shape = sizes.kv_heads, capacity, sizes.head_dim
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        return Ring(keys, values, self.counter, policy.sinks, self._rotation(layer), policy.block)

    def _rotation(self, layer: StripLayer) -> Rotation:
        """What a query of this layer undergoes before it meets the sinks: a view of one that all like it share."""
        dim, dtype = layer.plan.sizes.head_dim, self.model.dtype
        still = Rotation.still(layer.rope, dim, self.device, dtype)
        if layer.rope is None or not layer.policy.sinks or layer.policy.window is None:
            return still
        way = None if layer.plan.gap else layer.policy
        turns = next((turns for turns in self.turns if turns.rope is layer.rope), None)
        if turns is None:
            ways = [None if x.plan.gap else x.policy for x in self.layers if x.rope is layer.rope and x.policy.sinks]
            ways = list(dict.fromkeys(ways))
            rows = [Rotation.still(layer.rope, dim, self.device, dtype) for _ in ways]
            cos, sin = (torch.cat([getattr(row, name) for row in rows]) for name in ("cos", "sin"))
            turns = Turns(layer.rope, ways, Rotation(cos, sin, still.partner))
            self.turns.append(turns)
        row = turns.ways.index(way)
        return turns.rotation.rows(slice(row, row + 1))

    def restart(self, tokens: Tensor) -> None:
        """Begin another stream, no longer than the one this was made for, with the graph that there is."""
        self.tokens[: len(tokens)] = tokens.to(self.device)
        for ring in self.rings:
            ring.keys.zero_()
            ring.values.zero_()
        self.fed = self.at = 0
        self._stand()

    def prime(self, cache: StreamCache) -> None:
        """Take up the stream where ``cache`` has left it; to be called before the first step."""
        self.fed, self.at = cache.seen, cache.position
        while self.growing and self.growing[0].capacity <= self.fed:
            self._grow()
        for ring, layer in zip(self.rings, cache.kept, strict=True):
            assert isinstance(layer, StripLayer)
            held = slice(layer.start, layer.end)
            slots = ring.slots(torch.arange(self.fed - (layer.end - layer.start), self.fed, device=self.device))
            ring.keys[:, slots], ring.values[:, slots] = layer.keys[0, :, held], layer.values[0, :, held]
            if layer.sinks is not None:
                ring.keys[:, : ring.sinks], ring.values[:, : ring.sinks] = layer.sinks.keys[0], layer.sinks.values[0]
        self._stand()

    def _attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: Any) -> Tensor:
        return attend_ring(self.rings[index], scale, query[0, :, 0], key[0, :, 0], value[0, :, 0])[None, :, None]

    def _turn(self) -> None:
        """Set the rotations by which this step's queries meet the sinks."""
        for turns in self.turns:
            met = [self.counter if way is None else way.held(self.counter) for way in turns.ways]
            turns.rotation.set(turns.rope, torch.cat(met) - self.position)

    def _step(self) -> None:
        self.turn()
        token = self.tokens[self.counter]
        label = self.tokens[self.counter + 1]
        out = self.forward(
            input_ids=token[None], position_ids=self.position[None], past_key_values=self.cache, use_cache=True
        )
        self.nll.copy_(loss(out.logits[0, -1:], label)[0])
        self.counter += 1
        self.position += 1

    def capture(self) -> None:
        """Warm up, capture, and stand where the stream stood before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step()
                self._stand()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        self._stand()
        torch.cuda.synchronize()

    def _stand(self) -> None:
        self.counter.fill_(self.fed)
        self.position.fill_(self.at)

    def step(self) -> float:
        """Feed the next token; answer with the NLL of the one after. The device has finished when this returns."""
        assert self.graph is not None
        self.graph.replay()
        self.fed += 1
        self.at += 1
        return self.nll.item()

    def prepared(self) -> str | None:
        """Everything that is not part of a step: growth, moving back, capture. To be called before each step.

        Returns:
            Why the step cannot be captured; ``None`` where it is.
        """
        if self.growing and self.fed + 1 > self.growing[0].capacity:
            self._grow()
        if self.at + 1 > self.reach:
            self._move_back()
        if self.graph is not None:
            return None
        try:
            self.capture()
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever a model, a compiler or the driver holds against it
            return (" ".join(str(error).split()) or type(error).__name__)[:200]
        return None

    def _grow(self) -> None:
        """Longer buffers, a block at a time, and a new graph over them."""
        self.graph = None
        for ring in self.growing:
            for name in ("keys", "values"):
                old = getattr(ring, name)
                new = old.new_zeros(old.shape[0], old.shape[1] + BLOCK, old.shape[2])
                new[:, : old.shape[1]] = old
                setattr(ring, name, new)
                del old, new
            _mark(ring)

    def _move_back(self) -> None:
        """Move all window keys and the position back, so that the next token stands at the window's end."""
        window = self.plan.longest
        assert window is not None
        by = torch.tensor([window - self.at], device=self.device)
        for ring, layer in zip(self.rings, self.layers, strict=True):
            if layer.rope is not None:
                recent = ring.keys[:, ring.sinks :]
                recent.copy_(layer.rope.move(recent, by))
        self.at = window
        self._stand()

    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values held for the next step."""
        return int(bytes_held(self.plan, self.model.dtype.itemsize, self.fed))

    def __enter__(self) -> "CapturedStream":
        self._stack = ExitStack()
        self._stack.enter_context(lasting(self.model, min(len(self.tokens), self.reach) + 1))
        self._stack.enter_context(redirected(self.model, self._attend))
        return self

    def __exit__(self, *exc: object) -> None:
        self.graph = None
        self._stack.close()


def _mark(ring: Ring) -> None:
    """Buffers that grow are of no fixed length to the compiler: a new length needs no new code."""
    for buffer in (ring.keys, ring.values):
        torch._dynamo.maybe_mark_dynamic(buffer, 1)
