"""A model, a plan and a stream, set up so that a step is one replay of a captured graph.

A step reads its token, its label and its positions from device memory and advances the counters itself, so a replay
needs nothing from the host. Keys and values live in rings (:mod:`sinkbench.attention.kernels.ring`); the model's own
forward, parts of it on kernels of ours (:mod:`sinkbench.engines.single`), does the rest. Positions are kept small by
moving the rings' keys back now and then, between replays.
"""

from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinkbench.attention.adapters import mask_argument
from sinkbench.attention.kernels.ring import Ring, attend_ring
from sinkbench.attention.redirection import redirected
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import BLOCK, StripLayer
from sinkbench.compilers import compilable
from sinkbench.engines.clock import Clock
from sinkbench.engines.loss import loss
from sinkbench.engines.replacing import matrices_gathered
from sinkbench.engines.turns import turns, turns_of
from sinkbench.errors import UserError
from sinkbench.positions.families import family_of, lasting, takes_positions
from sinkbench.positions.reach import UNBOUNDED
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Plan

WARM_UPS = 2  # the first learns which matrices meet the same vector, the second asks for the kernels of their products
REACH = 8192  # positions at which the rings' keys are moved back, beyond twice the window


class _PassThrough(Cache):
    """Hands new keys and values on as they are: the rings are written by the attention."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class CapturedStream:
    """A model, a plan and a stream, set up for replay.

    Args:
        quick: whether parts of the model run on kernels of ours.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan, tokens: Tensor, quick: bool = True) -> None:
        self.model, self.plan, self.device, self.quick = model, plan, model.device, quick
        self.tokens = tokens.to(self.device)
        self.counter = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.nll = torch.zeros((), device=self.device, dtype=torch.promote_types(model.dtype, torch.float32))
        self.cache = _PassThrough()
        cache = StreamCache(model, plan)
        self.layers = [layer for layer in cache.kept if isinstance(layer, StripLayer)]
        self.fed = self.at = 0  # host mirrors of the counter and the position
        make = family_of(model).alibi
        self.alibi = make(model) if make else None
        self.turns = turns_of(self.layers, self.device, model.dtype)
        self.rings = [self._ring(layer) for layer in self.layers]
        window = plan.longest
        self.reach = UNBOUNDED if window is None or cache.reach.fixed else max(REACH, 2 * window)
        # the rings that grow; none in a dense model whose layers all have a window of their own
        self.growing = [r for r, layer in zip(self.rings, self.layers, strict=True) if layer.policy.window is None]
        self.arguments = mask_argument(model)
        if takes_positions(model):
            self.arguments["position_ids"] = self.position[None]
        self.clock = Clock(self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.parts: Any = None  # of the model, on kernels of ours

    def _ring(self, layer: StripLayer) -> Ring:
        sizes, policy, dtype = layer.plan.sizes, layer.policy, self.model.dtype
        capacity = BLOCK if policy.window is None else policy.window + 1
        shape = sizes.kv_heads, capacity, sizes.head_dim
        keys, values = (torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2))
        rotation = Rotation.still(layer.rope, sizes.head_dim, self.device, dtype)
        if turns(layer):
            rotation = next(t for t in self.turns if t.rope is layer.rope).of(layer)
        ring = Ring(keys, values, self.counter, policy.sinks, rotation, policy.block, gap=layer.plan.gap)
        ring.terms = self._terms(ring)
        return ring

    def _terms(self, ring: Ring) -> Tensor | None:
        """What ALiBi adds to the scores of a ring of this capacity."""
        if self.alibi is None:
            return None
        return self.alibi.slopes[:, None] if ring.gap else self.alibi.table(ring.capacity).contiguous()

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
        one = query[0, :, 0], key[0, :, 0]
        if self.parts is not None:  # whose heads may have yet to turn
            *one, special["angles"] = self.parts.unturned(query, key, self.layers[index].rope)
        return attend_ring(self.rings[index], scale, *one, value[0, :, 0], **special)[None, :, None]

    def _step(self) -> None:
        if self.parts is None:
            self._step_plainly()
            return
        with self.parts.overlapping(self.position):
            token = self.tokens[self.counter]
            self.parts.begin()
            self.parts.finish(self._logits(token))

    def _step_plainly(self) -> None:
        for rows in self.turns:
            rows.set(self.counter, self.position)
        label = self.tokens[self.counter + 1]
        self.nll.copy_(loss(self._logits(self.tokens[self.counter])[None], label)[0])
        self.counter += 1
        self.position += 1

    def _logits(self, token: Tensor) -> Tensor:
        """``(vocabulary,)``"""
        out = self.model(input_ids=token[None], past_key_values=self.cache, use_cache=True, **self.arguments)
        return out.logits[0, -1]

    def capture(self) -> None:
        """Warm up, capture, and stand where the stream stood before."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            with nullcontext() if self.parts is None else self.parts.asking():
                for _ in range(WARM_UPS):
                    self._step()
                    self._stand()
                    if self.parts is not None:
                        self.parts.learnt()
            if self.parts is not None:
                self._step()  # by kernels that are there
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

    def launch(self) -> None:
        """Feed the next token; :meth:`ended` is to be asked before anything else is."""
        assert self.graph is not None
        self.clock.begin()
        self.graph.replay()
        self.clock.end()
        self.fed += 1
        self.at += 1

    def ended(self) -> tuple[float, float]:
        """The NLL of the token behind the one that was fed, and the seconds of its step; waits for the device."""
        self.clock.wait()
        nll = self.nll.item()
        return nll, self.clock.seconds()

    @property
    def ready(self) -> bool:
        """Whether :meth:`prepared` has nothing to do."""
        return self.graph is not None and not self._full and self.at + 1 <= self.reach

    @property
    def _full(self) -> bool:
        return bool(self.growing) and self.fed + 1 > self.growing[0].capacity

    def prepared(self) -> str | None:
        """Everything that is not part of a step: growth, moving back, capture. For a stream that is not ready.

        Returns:
            Why the step cannot be captured; ``None`` where it is.
        """
        if self._full:
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
            ring.terms = self._terms(ring)

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

    def __enter__(self) -> "CapturedStream":
        with ExitStack() as stack:
            stack.enter_context(lasting(self.model, min(len(self.tokens), self.reach) + 1))
            stack.enter_context(redirected(self.model, self._attend))
            stack.enter_context(matrices_gathered(self.model))
            quick = self.quick and self.model.dtype != torch.float64
            single = compilable("sinkbench.engines.single.parts") if quick else None
            if single:
                self.parts = stack.enter_context(single.single_parts(self.model))
                # in memory of the host that the device writes to: nothing has to be fetched after a step
                self.nll = torch.zeros((), pin_memory=self.device.type == "cuda")
                arrivals = torch.zeros(1, dtype=torch.int32, device=self.device)
                self.parts.ends(self.turns, self.tokens, self.counter, self.position, self.nll, arrivals)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.clock.wait()  # for a step that nobody has asked about
        finally:
            self.graph = self.parts = None
            self._stack.close()
