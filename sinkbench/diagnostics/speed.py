"""What a token costs on the device at hand: the seed's loop, our engines, and the floors that physics sets."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sinkbench.engines.choice import choose_engine
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.step import Steps, synchronize
from sinkbench.models.sizes import active_parameters, layer_sizes
from sinkbench.positions.bare import device_of
from sinkbench.positions.detection import read_positions
from sinkbench.positions.rotary import Rope
from sinkbench.positions.rotation import Rotation
from sinkbench.signals import check
from sinkbench.strategies import Plan, choose

SEED_STEPS = 64  # of the seed's loop, which is slow
REPEATED = 2**18  # streams up to this length are read several times


@dataclass(frozen=True)
class Cost:
    """What was timed: steps one by one, or whole streams.

    Attributes:
        timings: milliseconds a token, one for each step or stream.
        peak_gib: GiB of CUDA memory allocated at most; ``None`` without CUDA, and for floors.
        each: what a timing is of: a ``step``, a ``stream``, or a ``probe`` of the device.
        floor: milliseconds in which weights and cache can be read once; of steps.
        first_row: seconds from the loaded model to the first row; of steps.
        wall: seconds to the last row of a stream of so many tokens as are read in parallel, the shortest of these; the
            rows that were not waited for are counted as long as those that were.
    """

    what: str
    timings: list[float] = field(repr=False)
    peak_gib: float | None = None
    each: str = "step"
    floor: float | None = None
    first_row: float | None = None
    wall: float | None = None

    @property
    def ms(self) -> float:
        """The median."""
        return median(self.timings)

    @property
    def spread(self) -> tuple[float, float]:
        """The 5th and the 95th percentile; of fewer than 20 timings, the least and the largest."""
        if len(self.timings) < 20:
            return min(self.timings), max(self.timings)
        cuts = quantiles(self.timings, n=20)
        return cuts[0], cuts[-1]

    @property
    def p99(self) -> float | None:
        """The 99th percentile, where there are enough timings to speak of one."""
        return quantiles(self.timings, n=100)[98] if len(self.timings) >= 100 else None


@dataclass(frozen=True)
class Timings:
    """What to measure.

    Attributes:
        window: cache entries kept.
        sinks: of them; ``None``: as many as each strategy has by itself.
        steps: tokens to time one by one, past a full window; 0: none, and not the seed's loop.
        streams: lengths of the streams to read in parallel.
        dense: tokens that dense attention holds while its steps are timed; 0: they are not.
        strategies: what is timed besides.
        kv_format: in which their caches are held.
        side_by_side: how many streams of a length are read at once.
    """

    window: int
    sinks: int | None
    steps: int
    streams: list[int]
    dense: int
    strategies: Sequence[str] = ("windowed", "attention_sinks")
    kv_format: str = "model"
    side_by_side: Sequence[int] = (1,)


def measure(model: PreTrainedModel, timings: Timings, note: Callable[[str], None] = lambda _: None) -> Iterator[Cost]:
    """Time every way of reading a stream of random tokens; ``note`` is told what comes next."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = max(*timings.streams, timings.dense, timings.window + timings.steps) + 1
    stream = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    sizes = layer_sizes(model.config)
    common: dict[str, Any] = {"window": timings.window, "sinks": timings.sinks, "kv_format": timings.kv_format}
    plans = {name: choose(name, **common).plan(sizes) for name in timings.strategies}
    note("the device")
    read, multiply = copy_seconds(model), product_seconds(model)
    held = {"": timings.window} | ({f", {timings.dense:,} tokens held": timings.dense} if timings.dense else {})
    for what, tokens in held.items():
        share = bytes_a_token(model, tokens)
        yield Cost(f"floor: weights and cache read once{what}", [1e3 * share * s for s in read], each="probe")
    work = _operations_a_token(model)
    yield Cost("floor: arithmetic", [1e3 * work * s for s in multiply], each="probe")
    if timings.steps:
        yield from _steps(model, timings, plans, stream, 1e3 * median(read), note)
    for name, kept in plans.items():
        reason = Parallel(model).refuses(kept)
        if reason is not None:
            note(f"parallel, {name}: {reason}")
            continue
        for count in timings.streams:
            for several in timings.side_by_side:
                what = f"parallel, {name}, {f'{several} x ' if several > 1 else ''}{count:,} tokens"
                note(what)
                yield _streams(what, model, kept, _copies(stream[: count + 1], several, vocabulary))


def _steps(
    model: PreTrainedModel,
    timings: Timings,
    plans: Mapping[str, Plan],
    stream: Tensor,
    read: float,
    note: Callable[[str], None],
) -> Iterator[Cost]:
    """Token by token: the seed's loop, each plan, and dense attention; ``read`` is milliseconds a byte."""
    note("the seed's loop")
    few, sinks = stream[: timings.window + min(timings.steps, SEED_STEPS) + 1], min(4, timings.window - 1)
    sinks = sinks if timings.sinks is None else timings.sinks
    floor = read * bytes_a_token(model, timings.window)
    seed = _timed("the seed's loop", partial(seed_loop, model, timings.window, sinks, few), few, timings.window)
    yield replace(seed, floor=floor, first_row=None, wall=None)
    rows = timings.window + timings.steps
    whole = stream[: max(timings.streams[0], rows) + 1]
    for name, kept in plans.items():
        note(f"stepwise, {name}")
        cost = _timed(f"stepwise, {name}", partial(_by_steps, model, kept, whole), whole, timings.window, rows)
        yield replace(cost, floor=floor)
    if timings.dense:
        note("stepwise, transformers")
        dense, some = choose("transformers", 1).plan(layer_sizes(model.config)), stream[: timings.dense + 1]
        name = f"stepwise, transformers, {timings.dense:,} tokens held"
        start = max(0, timings.dense - timings.steps)
        cost = _timed(name, partial(_by_steps, model, dense, some, start), some)
        yield replace(cost, floor=read * bytes_a_token(model, timings.dense), first_row=None, wall=None)


def _by_steps(model: PreTrainedModel, kept: Plan, tokens: Tensor, start: int = 0) -> Iterator[Steps]:
    return choose_engine(model, kept, "stepwise").run(kept, tokens, start)


@torch.inference_mode()
def seed_loop(model: PreTrainedModel, window: int, sinks: int, tokens: Tensor) -> Iterator[Steps]:
    """The loop of attention_sinks 0.4.0, re-created: one forward a token, eager attention, keys kept unturned.

    On every step the cache grows by concatenation, all its keys are turned to their places, and it is cut by
    concatenation. It follows its own code, so that its cost is that of the seed and its NLLs check our engines'.
    """
    cache = DynamicCache()
    cache.layers = [SeedLayer(rope, window + 1) for rope in read_positions(model)]
    device = device_of(model)
    with _eagerly(model):
        for t in range(len(tokens) - 1):
            synchronize()
            begin = time.perf_counter()
            held = torch.tensor([[min(t, window)]], device=device)
            token = tokens[t : t + 1][None].to(device)
            logits = model(input_ids=token, past_key_values=cache, position_ids=held, use_cache=True).logits[0, -1]
            nll = cross_entropy(logits.float(), tokens[t + 1].to(logits.device)).item()
            for layer in cache.layers:
                layer.cut(sinks, window - sinks)
            synchronize()
            yield Steps(t + 1, [nll], time.perf_counter() - begin, None, [0])


class SeedLayer(DynamicLayer):
    """One layer's cache in the seed's loop: its keys are unturned, and every step turns every key.

    A model hands its keys over already turned; taking that back, for the one new key, is what the seed did not do.
    """

    def __init__(self, rope: Rope | None, length: int) -> None:
        super().__init__()
        self.rope, self.length = rope, length
        self.turn: Rotation | None = None  # to the places 0 .. length - 1, in the model's dtype as in the seed

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            return super().update(key_states, value_states)
        if self.turn is None:
            places = torch.arange(self.length, device=key_states.device)
            turn = Rotation.still(self.rope, key_states.shape[-1], key_states.device).by(self.rope, places)
            self.turn = Rotation(turn.cos.to(key_states.dtype), turn.sin.to(key_states.dtype), turn.partner)
        place = self.get_seq_length()
        back = self.turn.rows(slice(place, place + 1))
        raw = self._turned(key_states, Rotation(back.cos, -back.sin, back.partner))
        keys, values = super().update(raw, value_states)
        return self._turned(keys, self.turn.rows(slice(0, place + 1))), values

    @staticmethod
    def _turned(keys: Tensor, turn: Rotation) -> Tensor:
        return keys * turn.cos + keys[..., turn.partner] * turn.sin

    def cut(self, sinks: int, recent: int) -> None:
        """Drop all but the first ``sinks`` entries and the last ``recent`` ones."""
        if self.keys.shape[2] > sinks + recent:
            self.keys, self.values = (
                torch.cat((held[:, :, :sinks], held[:, :, -recent:]), dim=2) for held in (self.keys, self.values)
            )


@contextmanager
def _eagerly(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _timed(
    what: str, begin: Callable[[], Iterator[Steps]], stream: Tensor, skip: int = 0, rows: int | None = None
) -> Cost:
    """The latencies of steps over ``stream``, the first ``skip`` left out, ``rows`` of them at most."""
    _forget_peak()
    latencies: list[float] = []
    started, first, count = time.perf_counter(), 0.0, 0
    steps = begin()
    for step in steps:
        check()
        first = first if count else time.perf_counter() - started
        if count >= skip and step.latency is not None:
            latencies.append(1e3 * step.latency)
        count += 1
        if count == rows:
            break
    each = (time.perf_counter() - started - first) / max(1, count - 1)
    getattr(steps, "close", lambda: None)()
    return Cost(what, latencies, _peak(), first_row=first, wall=first + each * (len(stream) - 2))


def _copies(tokens: Tensor, count: int, vocabulary: int) -> list[Tensor]:
    """Streams that differ in every token."""
    return [(tokens + i) % vocabulary for i in range(count)]


def _streams(what: str, model: PreTrainedModel, kept: Plan, streams: Sequence[Tensor]) -> Cost:
    """Seconds of whole streams, all at once, from cold caches to the last NLL; a token of each counts."""
    engine = Parallel(model, side_by_side=len(streams))
    for _ in engine.run_many(kept, [tokens[: 2**16 + 1] for tokens in streams]):  # so that kernels are there
        pass
    _forget_peak()
    timings = []
    for _ in range(3 if len(streams[0]) <= REPEATED else 1):
        synchronize()
        start = time.perf_counter()
        count = sum(len(steps.nll) for _, steps in engine.run_many(kept, streams))
        synchronize()
        timings.append((time.perf_counter() - start) / count * 1e3)
    return Cost(what, timings, _peak(), each="stream")


def _forget_peak() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def _peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())) / 2**30


def copy_seconds(model: PreTrainedModel) -> list[float]:
    """Seconds a byte, of large copies on the model's device; bytes read and bytes written both count."""
    device = device_of(model)
    size = 2**31 if device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return [seconds / (2 * size) for seconds in _seconds(lambda: target.copy_(source))]


def product_seconds(model: PreTrainedModel) -> list[float]:
    """Seconds an operation, of large matrix products in the model's dtype on random numbers."""
    device = device_of(model)
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=model.dtype, device=device)
    return [seconds / (2 * n**3) for seconds in _seconds(lambda: a @ b)]


def _seconds(work: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(12):
        check()
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    return times[2:]


def _matrices(model: PreTrainedModel) -> int:
    """Weights that a token meets: all but the embedding table, which is only looked up, and experts of others."""
    table = model.get_input_embeddings().weight
    total = active_parameters(model, model.config.get_text_config(decoder=True))
    return total if model.get_output_embeddings().weight is table else total - table.numel()


def bytes_a_token(model: PreTrainedModel, held: int) -> int:
    """Bytes of the weights, and of the keys and values of ``held`` tokens, of which a sliding layer sees its window."""
    sizes = layer_sizes(model.config)
    cache = sum(2 * layer.kv_heads * layer.head_dim * min(held, layer.window or held) for layer in sizes)
    return (_matrices(model) + cache) * model.dtype.itemsize


def _operations_a_token(model: PreTrainedModel) -> int:
    return 2 * _matrices(model)
