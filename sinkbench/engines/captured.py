"""Token by token as one captured CUDA graph a step: the same numbers, at the speed of memory.

A step reads its token, its label and its positions from device memory and advances the counters itself, so a replay
needs nothing from the host. Keys and values live in rings (:mod:`sinkbench.attention.kernels.ring`); the model's own
forward, compiled, does the rest. Positions are kept small by turning the rings back now and then, between replays.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from sinkbench.attention.kernels.ring import Ring, attend_ring
from sinkbench.attention.redirection import redirected
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import BLOCK, StripLayer
from sinkbench.engines.prefill import prefilled
from sinkbench.engines.step import Steps, vram_allocated
from sinkbench.positions.families import family_of, lasting, takes_positions
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.strategies import Keep

WARM_UPS = 3
REACH = 8192  # positions at which the rings are turned back, beyond twice the window
# Products of a matrix with one vector are bound by memory; inductor's reductions, tuned, come closer to it than cuBLAS.
COMPILE = {"coordinate_descent_tuning": True}


def can_capture(model: PreTrainedModel, keep: Keep) -> bool:
    """Whether a step of ``model`` under ``keep`` can be captured."""
    config = model.config.get_text_config(decoder=True)
    special = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    if model.device.type != "cuda" or keep.fresh or special or family_of(model).alibi or not takes_positions(model):
        return False
    if len({p.device for p in model.parameters()}) > 1 or getattr(model, "is_loaded_in_8bit", False):
        return False  # several devices; or bitsandbytes' 8-bit products, which ask the host in the middle
    layers = StreamCache(model, keep).layers
    return all(isinstance(layer, StripLayer) and not layer.keys_unrotated for layer in layers)


class _PassThrough(Cache):
    """Hands new keys and values on as they are: the rings are written by the attention."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


# Those of the runs in progress, by a handle that compiled code can carry. The handles of one run after the other are
# the same, so that what was compiled for the first serves the next.
_rings: dict[int, Ring] = {}


def _free_handles(count: int) -> list[int]:
    begin = max(_rings, default=-1) + 1
    return list(range(begin, begin + count))


@torch.library.custom_op("sinkbench::attend_ring", mutates_args=())
def _attend_op(handle: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attend_ring(_rings[handle], scale, query, key, value)


@_attend_op.register_fake
def _(handle: int, scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


class CapturedStream:
    """A model, a strategy and a stream, set up for replay.

    Args:
        compiled: whether the model's forward is compiled before it is captured.
    """

    def __init__(self, model: PreTrainedModel, keep: Keep, tokens: Tensor, compiled: bool = True) -> None:
        self.model, self.keep, self.device = model, keep, model.device
        self.tokens = tokens.to(self.device)
        self.counter = torch.zeros(1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, dtype=torch.long, device=self.device)
        self.nll = torch.zeros((), device=self.device)
        self.cache = _PassThrough()
        self.layers = StreamCache(model, keep).kept
        self.fed = self.at = 0  # host mirrors of the counter and the position
        self.turns: dict[int, tuple[Rope, Rotation]] = {}
        self.sizes: Counter[tuple[int | None, int]] = Counter()  # layers by window and bytes a token
        self.handles = _free_handles(len(self.layers))
        self._make_rings()
        limits = [layer.rope.limit for layer in self.layers if layer.rope and layer.rope.limit]
        self.reach = min([max(REACH, 2 * (keep.window or 0)), *limits])  # positions stay within it
        # the rings that grow; none in a dense model whose layers all have a window of their own
        self.growing = [h for h, layer in zip(self.handles, self.layers, strict=True) if layer.keep.window is None]
        forward = model.forward
        self.forward = torch.compile(forward, dynamic=False, options=dict(COMPILE)) if compiled else forward
        # apart from the forward: the rings read the turns behind the compiler's back
        self.turn = torch.compile(self._turn, dynamic=False) if compiled else self._turn
        self.graph: torch.cuda.CUDAGraph | None = None

    def _make_rings(self) -> None:
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if config.model_type == "falcon":
            heads = self._falcon_heads(config)
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for handle, layer in zip(self.handles, self.layers, strict=True):
            window = layer.keep.window
            capacity = BLOCK if window is None else window + 1
            dtype, device = self.model.dtype, self.device
            keys, values = (torch.zeros(heads, capacity, dim, dtype=dtype, device=device) for _ in range(2))
            turn = Rotation.still(layer.rope, dim, device)
            if layer.rope is not None and layer.keep.sinks:
                _, turn = self.turns.setdefault(id(layer.rope), (layer.rope, turn))
            _rings[handle] = Ring(keys, values, self.counter, layer.keep.sinks, turn)
            self.sizes[window, 2 * heads * dim * dtype.itemsize] += 1

    @staticmethod
    def _falcon_heads(config: Any) -> int:
        if config.new_decoder_architecture or not config.multi_query:
            return config.num_attention_heads
        return 1

    def prime(self, cache: StreamCache) -> None:
        """Take up the stream where ``cache`` has left it; to be called before the first step."""
        self.fed, self.at = cache.seen, cache.position
        for handle, layer in zip(self.handles, cache.kept, strict=True):
            while layer.keep.window is None and _rings[handle].capacity <= self.fed:
                self._grow()
            ring, held = _rings[handle], slice(layer.start, layer.end)
            slots = ring.slots(torch.arange(self.fed - (layer.end - layer.start), self.fed, device=self.device))
            ring.keys[:, slots], ring.values[:, slots] = layer.keys[0, :, held], layer.values[0, :, held]
            if layer.sinks is not None:
                ring.keys[:, : ring.sinks], ring.values[:, : ring.sinks] = layer.sinks.keys[0], layer.sinks.values[0]
        self._stand()

    def _attend(self, index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: Any) -> Tensor:
        out = torch.ops.sinkbench.attend_ring(self.handles[index], scale, query[0, :, 0], key[0, :, 0], value[0, :, 0])
        return out[None, :, None]

    def _turn(self) -> None:
        """Set the turns by which this step's queries meet the sinks."""
        window = self.keep.window
        if window is not None:
            by = self.counter.clamp_max(window) - self.position
            for rope, turn in self.turns.values():
                turn.set(rope, by)

    def _step(self) -> None:
        self.turn()
        token = self.tokens[self.counter]
        label = self.tokens[self.counter + 1]
        out = self.forward(
            input_ids=token[None], position_ids=self.position[None], past_key_values=self.cache, use_cache=True
        )
        self.nll.copy_(cross_entropy(out.logits[0, -1:].float(), label))
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
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()
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

    def prepare(self) -> None:
        """Everything that is not part of a step: growth, capture, turning back. To be called before each step."""
        if self.keep.window is None:
            if self.growing and self.fed + 1 > _rings[self.growing[0]].capacity:
                self._grow()
        elif self.at + 1 > self.reach:
            self._turn_back()
        if self.graph is None:
            self.capture()

    def _grow(self) -> None:
        """Longer buffers, a block at a time, and a new graph over them."""
        self.graph = None
        for handle in self.growing:
            ring = _rings[handle]
            for name in ("keys", "values"):
                old = getattr(ring, name)
                new = old.new_zeros(old.shape[0], old.shape[1] + BLOCK, old.shape[2])
                new[:, : old.shape[1]] = old
                setattr(ring, name, new)
                del old, new

    def _turn_back(self) -> None:
        """Move all window keys and the position back, so that the next token stands at the window's end."""
        assert self.keep.window is not None
        by = torch.tensor([self.keep.window - self.at], device=self.device)
        for handle, layer in zip(self.handles, self.layers, strict=True):
            if layer.rope is not None:
                recent = _rings[handle].keys[:, layer.keep.sinks :]
                recent.copy_(layer.rope.move(recent, by))
        self.at = self.keep.window
        self._stand()

    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values held for the next step."""
        held = {window: self.fed if window is None else min(self.fed, window) for window, _ in self.sizes}
        return sum(count * held[window] * size for (window, size), count in self.sizes.items())

    def __enter__(self) -> "CapturedStream":
        self._stack = ExitStack()
        longest = len(self.tokens) if self.keep.window is None else REACH + 2 * self.keep.window
        self._stack.enter_context(lasting(self.model, longest))
        self._stack.enter_context(redirected(self.model, self._attend))
        return self

    def __exit__(self, *exc: object) -> None:
        self.graph = None
        self._stack.close()
        for handle in self.handles:
            _rings.pop(handle, None)


@torch.no_grad()
def captured(
    model: PreTrainedModel, keep: Keep, tokens: Tensor, start: int = 0, compiled: bool = True
) -> Iterator[Steps]:
    """As :func:`sinkbench.engines.stepwise.stepwise`, by replaying a captured graph; CUDA only.

    Capture, growth and turning back are not part of any step's latency.
    """
    stream = CapturedStream(model, keep, tokens, compiled)
    if start:
        stream.prime(prefilled(model, keep, tokens[:start]))
    with stream:
        for t in range(start, len(tokens) - 1):
            stream.prepare()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            nll = stream.step()
            latency = time.perf_counter() - begin
            yield Steps(t + 1, [nll], latency, vram_allocated(), [stream.kv_cache_bytes()])
