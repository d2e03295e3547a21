"""What a run will cost: memory and time, before anything is loaded.

Memory is counted: weights, keys and values, the states of one forward. Time is the floor that the device sets, reading
weights or multiplying matrices at a measured rate, times factors that were measured once and are named below. Loading
and downloads are left out.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from sinkbench.cache.held import bytes_a_token
from sinkbench.cache.strip import BLOCK, compaction_interval
from sinkbench.config import RunConfig
from sinkbench.engines.chunks import bytes_at_once, fitting, most_at_once, refuses_plan
from sinkbench.engines.head import ON_GPU, SLICE_BYTES
from sinkbench.engines.lanes import LANES
from sinkbench.errors import UserError
from sinkbench.models.sizes import ModelSizes
from sinkbench.strategies import LayerPlan, Plan
from sinkbench.strategies.reference import end_of, reference_run
from sinkbench.strategies.registry import chosen_by
from sinkbench.sweeps.device import Device, dtype_of
from sinkbench.sweeps.lengths import streams_of, windows_asked

# Times the products alone. results/h200/llama_2_7b_speed.md: 24 to 27 us a token where the products take 17 at the rate
# of one large product. On two CPU cores SmolLM2-135M needs 2.1 ms a token where they take 1.4.
OVER_ARITHMETIC = 1.55
# Seconds a layer and step beside reading its weights. Graphs: results/h200, StableLM-3B needs 1.72 ms for 32 layers
# that are read in 1.38, Gemma 2 9B 5.17 ms for 42 in 4.51. Plain: the seed's loop takes 23 to 36 ms for 32.
# CPU: on two cores SmolLM2-135M needs 36 ms, 22 of them to read its weights.
A_LAYER = {"graph": 12e-6, "cuda": 1e-3, "cpu": 4e-4}
# Bytes moved for a score where no fused kernel computes attention: results/h200/smollm2_135m_parallel, float32.
A_SCORE = 190
CAPTURED_STEP = 3.0  # seconds until one is ready (results/h200)
# Seconds to write down a row, of many at once and one by one.
A_ROW = {"parallel": 1.5e-6, "stepwise": 5e-6}
WORKSPACE = 32 * 2**20  # bytes that matrix products take on CUDA
# Bytes a quantised weight takes with its scales: NF4 has a float32 for 64 weights, int8 one for a row.
QUANTISED = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}


@dataclass(frozen=True)
class Estimate:
    """The largest allocation on the device, in bytes, and seconds from the first token to the last."""

    vram_bytes: int
    seconds: float


def estimate(options: RunConfig, shape: ModelSizes, device: Device) -> Estimate:
    """What ``options`` will need on ``device`` with a model of this shape.

    The CUDA context (about half a GiB) comes on top of the memory.

    Raises:
        UserError: sizes that leave no window, or what the engine cannot run.
    """
    if options.protocol != "stream":
        return _Run(options, shape, device).windows_estimate()
    found = [(count, _of_one(options.but(num_tokens=n), shape, device)) for count, n in streams_of(options)]
    return Estimate(max(one.vram_bytes for _, one in found), sum(count * one.seconds for count, one in found))


def _of_one(options: RunConfig, shape: ModelSizes, device: Device) -> Estimate:
    """Of one stream."""
    alone = reference_run(options)
    if alone is None:
        return _Run(options, shape, device).estimate()
    # a reference has forwards and a cache of its own, and neither is captured
    own, beside = _Run(options.but(cuda_graphs=False), shape, device).estimate(), _Run(alone, shape, device)
    end = end_of(beside.plan, options.num_tokens, shape.context_length)
    if end is not None:
        beside = _Run(alone.but(num_tokens=end), shape, device)
    return Estimate(own.vram_bytes + beside.cache_bytes, own.seconds + beside.estimate().seconds)


@dataclass(frozen=True)
class _Run:
    options: RunConfig
    shape: ModelSizes
    device: Device

    def estimate(self) -> Estimate:
        memory = self.weights + self.cache_bytes + self.state_bytes + self.workspace
        if self.plan.context is not None:
            seconds = self.fresh_seconds
        elif self.is_parallel:
            seconds = self.parallel_seconds
        else:
            seconds = self.stepwise_seconds
        return Estimate(memory, seconds + self.options.num_tokens * A_ROW[self.options.engine])

    def windows_estimate(self) -> Estimate:
        """Of windows without a cache: what is fed passes the layers, and what counts the head."""
        windows = windows_asked(self.options)
        fed, counted = sum(one.fed for one in windows), sum(one.predictions for one in windows)
        pairs = sum(one.fed**2 for one in windows) / 2
        head, longest = self.shape.head_weights, max(one.fed for one in windows)
        together = min(fed, max(1, self.chunk // longest) * longest)
        seconds = fed * self.product_seconds(self.shape.met_weights - head) + counted * self.product_seconds(head)
        seconds += self.attention_seconds(self.shape.layers * pairs) + counted * A_ROW["parallel"]
        return Estimate(self.weights + together * self.a_state + self.slice_bytes + self.workspace, seconds)

    @property
    def workspace(self) -> int:
        return WORKSPACE if self.device.kind == "cuda" else 0

    @cached_property
    def plan(self) -> Plan:
        plan = chosen_by(self.options).plan(self.shape.layer_sizes())
        reason = refuses_plan(plan) if self.is_parallel and plan.context is None else None
        if reason is not None:
            raise UserError(f"the parallel engine cannot run this: {reason}")
        return plan

    @property
    def is_parallel(self) -> bool:
        return self.options.engine == "parallel"

    @property
    def is_graphed(self) -> bool:
        return (
            self.device.kind == "cuda"
            and self.options.cuda_graphs
            and not self.is_parallel
            and self.plan.context is None
            and not self.plan.by_score
            and self.plan.as_computed
        )

    @property
    def itemsize(self) -> int:
        return dtype_of(self.options, self.shape, self.device.kind).itemsize

    # Memory

    def stored(self, weights: int) -> int:
        """Bytes of weights of layers, quantised or not."""
        return round(weights * QUANTISED.get(self.options.quantization or "", self.itemsize))

    @property
    def weights(self) -> int:
        tables = self.shape.head_weights * (1 if self.shape.tied else 2)  # never quantised
        return self.stored(self.shape.parameters - tables) + tables * self.itemsize

    @property
    def layers(self) -> list[tuple[int, LayerPlan]]:
        """Numbers of layers that keep the same, and what they keep."""
        return [(count, layer) for layer, count in Counter(self.plan.kept).items()]

    @property
    def cache_bytes(self) -> int:
        if self.plan.context is not None:
            return 0
        held = [count * self.slots(layer) * bytes_a_token(layer, self.itemsize) for count, layer in self.layers]
        return round(sum(held))

    def slots(self, layer: LayerPlan) -> int:
        """Entries for which a layer has room."""
        bound = layer.policy.window
        if bound is None:
            return -(-self.options.num_tokens // BLOCK) * BLOCK
        if self.is_graphed or layer.by_score:
            return bound + 1
        return bound + max(self.chunk if self.is_parallel else 1, compaction_interval(layer.policy))

    @property
    def most(self) -> int:
        return most_at_once(self.plan, self.device.kind == "cuda", self.shape.heads)

    @property
    def slice_bytes(self) -> int:
        """Logits that are there at once: a processor copies them, a GPU reads larger slices as they are."""
        return SLICE_BYTES * (ON_GPU if self.device.kind == "cuda" else 3)

    @property
    def a_state(self) -> int:
        """Bytes of hidden states, and of scores, for one token of a forward, as the parallel engine reckons."""
        plan = self.plan if self.is_parallel else None
        shape = self.shape
        return bytes_at_once(plan, shape.hidden_size, shape.intermediate_size, shape.heads, self.itemsize, self.most)

    @property
    def chunk(self) -> int:
        """Tokens a forward of the parallel engine."""
        free = max(0, self.device.memory - self.weights)
        return min(self.options.chunk_size or fitting(self.a_state, free, self.most), self.options.num_tokens)

    @property
    def state_bytes(self) -> int:
        together = self.chunk if self.is_parallel else 1
        if self.plan.context is not None:
            window = min(self.plan.context, self.options.num_tokens)
            together = window * max(1, 2 * self.chunk // window) if self.is_parallel else window
        logits = self.slice_bytes if self.is_parallel else 3 * 4 * self.shape.vocab_size
        return self.at_once * together * self.a_state + logits

    @property
    def at_once(self) -> int:
        """Chunks that are under way at once."""
        if not (self.is_parallel and self.plan.by_score and self.device.kind == "cuda") or self.options.trace:
            return 1
        room = max(0, self.device.memory - self.weights) / 4 // (self.chunk * self.a_state)
        return max(1, min(LANES, int(room), self.options.num_tokens // self.chunk))

    # Time

    def held(self, bound: float | None) -> float:
        """Tokens that are held when a token comes, ``bound`` at most, on the average over the stream."""
        n = self.options.num_tokens
        full = n if bound is None else min(bound, n)
        return (full * (full - 1) / 2 + (n - full) * full) / n

    def held_by(self, layer: LayerPlan) -> float:
        """Entries that a layer holds, on the average; where several go at once, it is full now and then only."""
        window = layer.policy.window
        return self.held(None if window is None else window - (layer.policy.block - 1) / 2)

    @property
    def read_bytes(self) -> float:
        """Bytes of the weights that a token meets."""
        head = self.shape.head_weights
        return self.stored(self.shape.met_weights - head) + head * self.itemsize

    def attention_seconds(self, keys: float) -> float:
        """For the scores of one token with ``keys`` keys, over all layers together, many tokens at once."""
        fused = self.shape.plain_attention or self.device.kind == "cuda"
        fused &= not self.plan.by_score  # a scan reads each score
        arithmetic = 4 * self.shape.heads * self.shape.head_dim * keys / self.device.rate * OVER_ARITHMETIC
        return arithmetic if fused else max(arithmetic, A_SCORE * self.shape.heads * keys / self.device.bandwidth)

    def product_seconds(self, weights: int) -> float:
        """For one token's products with ``weights``, among many tokens."""
        return 2 * weights / self.device.rate * OVER_ARITHMETIC

    @property
    def stepwise_seconds(self) -> float:
        cache = sum(count * self.held_by(x) * bytes_a_token(x, self.itemsize) for count, x in self.layers)
        step = (self.read_bytes + cache) / self.device.bandwidth
        step += self.shape.layers * A_LAYER["graph" if self.is_graphed else self.device.kind]
        return self.options.num_tokens * step + (CAPTURED_STEP if self.is_graphed else 0)

    @property
    def parallel_seconds(self) -> float:
        beside = self.chunk if self.plan.by_score else 0  # a row of scores has a column for each token of the chunk
        keys = sum(count * (self.held_by(layer) + beside) for count, layer in self.layers)
        n = self.options.num_tokens
        busy = n * (self.product_seconds(self.shape.met_weights) + self.attention_seconds(keys))
        return max(busy, n / self.chunk * self.read_bytes / self.device.bandwidth)

    @property
    def fresh_seconds(self) -> float:
        """Every token's forward reads a window, and takes the head once."""
        n, head = self.options.num_tokens, self.shape.head_weights
        window = self.held(self.plan.context) + 1
        body = self.product_seconds(self.shape.met_weights - head) + self.attention_seconds(
            self.shape.layers * window / 2
        )
        step = window * body + self.product_seconds(head)
        if not self.is_parallel:  # one forward a token
            layers = self.shape.layers * A_LAYER[self.device.kind]
            step = max(step, self.read_bytes / self.device.bandwidth) + layers
        return n * step
