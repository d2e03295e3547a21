"""What a token costs on the device at hand: the seed's loop, our engines, and the floors that physics sets."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median, quantiles

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel

from sinkbench.engines.graphed import can_graph, graphed
from sinkbench.engines.parallel import parallel
from sinkbench.engines.step import Steps, synchronize
from sinkbench.engines.stepwise import stepwise
from sinkbench.strategies import Keep, resolve


@dataclass(frozen=True)
class Cost:
    """Milliseconds a token: the median, and the 99th percentile where tokens were timed one by one."""

    what: str
    ms: float
    p99: float | None
    tokens: int


def measure(
    model: PreTrainedModel,
    window: int,
    sinks: int,
    steps: int,
    tokens: int,
    note: Callable[[str], None] = lambda _: None,
) -> list[Cost]:
    """Time every way of reading a stream, ``steps`` tokens one by one (past a full window), ``tokens`` in parallel."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(0, vocabulary, (max(tokens, window + steps) + 1,), generator=generator)
    keep = resolve("attention_sinks", window, sinks)
    costs = [Cost("floor: weights and cache read once", _bytes_a_token(model, keep) / bandwidth(model) * 1e3, None, 1)]
    costs.append(Cost("floor: arithmetic", _operations_a_token(model) / matrix_rate(model) * 1e3, None, 1))
    note("the seed's loop")
    costs.append(_timed("the seed's loop", seed_loop(model, keep, stream[: window + min(steps, 64) + 1]), window))
    for name in ("windowed", "attention_sinks"):
        keep = resolve(name, window, sinks)
        note(f"stepwise, {name}")
        engine = graphed if can_graph(model, keep) else stepwise
        costs.append(_timed(f"stepwise, {name}", engine(model, keep, stream[: window + steps + 1]), window))
        note(f"parallel, {name}")
        costs.append(_parallel(f"parallel, {name}", model, keep, stream[: tokens + 1]))
    return costs


@torch.inference_mode()
def seed_loop(model: PreTrainedModel, keep: Keep, tokens: Tensor) -> Iterator[Steps]:
    """The seed's loop: eager attention, a cache that grows by concatenation and is cut by concatenation.

    It leaves out the seed's turning of all cached keys on every step, so it is faster than the seed, never slower.
    """
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache = DynamicCache()
        for t in range(len(tokens) - 1):
            synchronize()
            begin = time.perf_counter()
            held = torch.tensor([[min(t, keep.window or t)]], device=model.device)
            token = tokens[t : t + 1][None].to(model.device)
            logits = model(input_ids=token, past_key_values=cache, position_ids=held, use_cache=True).logits[0, -1]
            nll = cross_entropy(logits.float(), tokens[t + 1].to(model.device)).item()
            _cut(cache, keep)
            synchronize()
            yield Steps(t + 1, [nll], time.perf_counter() - begin, None, [0])
    finally:
        model.set_attn_implementation(before)


def _cut(cache: DynamicCache, keep: Keep) -> None:
    assert keep.recent is not None
    for layer in cache.layers:
        if layer.keys.shape[2] > keep.sinks + keep.recent:
            for name in ("keys", "values"):
                held = getattr(layer, name)
                setattr(layer, name, torch.cat((held[:, :, : keep.sinks], held[:, :, -keep.recent :]), dim=2))


def _timed(what: str, steps: Iterator[Steps], window: int) -> Cost:
    """Latencies of the steps past a full window."""
    latencies = [step.latency for step in islice(steps, window, None) if step.latency is not None]
    p99 = quantiles(latencies, n=100)[98] if len(latencies) > 1 else None
    return Cost(what, median(latencies) * 1e3, p99 and p99 * 1e3, len(latencies))


def _parallel(what: str, model: PreTrainedModel, keep: Keep, tokens: Tensor) -> Cost:
    for _ in parallel(model, keep, tokens[: min(len(tokens), 50_001)]):  # warm: compilation is not a token's cost
        pass
    synchronize()
    begin = time.perf_counter()
    count = sum(len(steps.nll) for steps in parallel(model, keep, tokens))
    synchronize()
    return Cost(what, (time.perf_counter() - begin) / count * 1e3, None, count)


def bandwidth(model: PreTrainedModel) -> float:
    """Bytes a second of a large copy on the model's device, read and written."""
    size = 2**31 if model.device.type == "cuda" else 2**27
    source = torch.empty(size, dtype=torch.uint8, device=model.device).random_()
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source))


def matrix_rate(model: PreTrainedModel) -> float:
    """Operations a second of a large matrix product in the model's dtype on random numbers."""
    n = 8192 if model.device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, dtype=model.dtype, device=model.device)
    return 2 * n**3 / _best(lambda: a @ b)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(8):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begin)
    return median(times[2:])


def _matrices(model: PreTrainedModel) -> int:
    """Weights that every token meets: all but the embedding table, which is only looked up."""
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    return total if head is table else total - table.numel()


def _bytes_a_token(model: PreTrainedModel, keep: Keep) -> int:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * dim * (keep.window or 0)
    return (_matrices(model) + cache) * model.dtype.itemsize


def _operations_a_token(model: PreTrainedModel) -> int:
    return 2 * _matrices(model)
