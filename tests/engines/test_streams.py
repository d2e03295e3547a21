"""Independent streams side by side: each says what it says alone, whatever its neighbours are and however long."""

from functools import cache

import pytest
import tiny
import torch
from evictions import RULES
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbench.attention import patterns
from sinkbench.engines import chunks
from sinkbench.engines.batches import batches, pieces
from sinkbench.engines.chunks import Room
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.recompute import Recompute
from sinkbench.engines.stepwise import Stepwise
from sinkbench.engines.streams import run_many

CHANGING = ("dynamic", "longrope")  # frequencies change within the text, so that scores in it would
BY_POSITION = {
    "attention_sinks": {},
    "windowed": {},
    "transformers": {},
    "context_shift": {},
    "pyramid": {"beta": 2},
}
STRATEGIES = {name: (name, values) for name, values in BY_POSITION.items()}
STRATEGIES |= {rule: (name, {**values, "recent": 3}) for rule, (name, values, _) in RULES.items()}
CASES = [
    pytest.param(
        family,
        strategy,
        marks=() if family in tiny.FEW or strategy in ("attention_sinks", "h2o") else pytest.mark.heavy,
    )
    for family in tiny.STREAMABLE
    for strategy in STRATEGIES
    if family != "qwen3_next" and not (family in CHANGING and strategy not in ("windowed", "attention_sinks"))
]
RAGGED = (40, 61, 2, 17, 60, 33)


@cache
def double(family):
    """In float64; gpt-oss has no such kernels for its experts."""
    model = tiny.STREAMABLE[family]()
    return model if family == "gpt_oss" else model.double()


def streams_of(lengths, seed=0):
    return [tiny.tokens(length, 100 * seed + i) for i, length in enumerate(lengths)]


def alone(model, plan, stream, chunk):
    return torch.tensor(
        [x for steps in Parallel(model, chunk).run(plan, stream) for x in steps.nll], dtype=torch.float64
    )


def together(engine, plan, streams, first=0, start=0):
    """NLLs by stream; they must come stream after stream and row after row."""
    found = {}
    for index, steps in run_many(engine, plan, streams, first, start):
        assert index == max([first, *found]) or index > max(found)
        rows = found.setdefault(index, [])
        assert steps.first == len(rows) + 1 + (start if index == first else 0)
        assert len(steps.nll) == len(steps.kv_cache_bytes)
        rows.extend(steps.nll)
    return {index: torch.tensor(rows, dtype=torch.float64) for index, rows in found.items()}


def agree(model, plan, streams, chunk, side_by_side, close=1e-9):
    found = together(Parallel(model, chunk, side_by_side=side_by_side), plan, streams)
    for index, stream in enumerate(streams):
        wanted = alone(model, plan, stream, chunk)
        assert len(found[index]) == len(stream) - 1
        assert (found[index] - wanted).abs().max() <= (close if model.dtype == torch.float64 else 2e-4)


@pytest.mark.parametrize(("family", "strategy"), CASES)
def test_each_stream_says_what_it_says_alone(family, strategy):
    name, values = STRATEGIES[strategy]
    model = double(family)
    agree(model, tiny.plan(model, name, 9, 2, **values), streams_of(RAGGED), 13, 4)


@settings(deadline=None, max_examples=30)
@given(
    strategy=st.sampled_from(sorted(STRATEGIES)),
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=9),
    chunk=st.integers(1, 40),
    side_by_side=st.integers(1, 6),
    seed=st.integers(0, 50),
)
def test_whatever_the_lengths_the_chunk_and_the_batch(strategy, lengths, chunk, side_by_side, seed):
    name, values = STRATEGIES[strategy]
    model = double("llama")
    agree(model, tiny.plan(model, name, 9, 2, **values), streams_of(lengths, seed), chunk, side_by_side)


IN_FEWER_BITS = [
    *((name, stored) for name in ("transformers", "attention_sinks", "h2o") for stored in ("q8_0", "q4_0", "fp8_e4m3")),
    ("transformers", "kivi2:group=8,residual=16"),
]


@pytest.mark.parametrize(("strategy", "kv_format"), IN_FEWER_BITS)
def test_formats_are_those_of_each_stream(strategy, kv_format):
    model = tiny.build("llama", num_key_value_heads=2, head_dim=32).double()
    agree(model, tiny.plan(model, strategy, 9, 2, kv_format=kv_format), streams_of(RAGGED), 17, 4)


@pytest.mark.parametrize("rule", RULES)
def test_without_kernels_a_scan_keeps_streams_apart_too(rule, monkeypatch):
    monkeypatch.setattr(patterns, "scans_for", lambda kind: None)
    name, values = STRATEGIES[rule]
    model = double("llama")
    agree(model, tiny.plan(model, name, 9, 2, **values), streams_of(RAGGED), 13, 3)


@pytest.mark.parametrize("strategy", ["attention_sinks", "h2o", "random"])
@pytest.mark.parametrize(("first", "start"), [(0, 0), (1, 20), (3, 0), (5, 31)])
def test_streams_taken_up_in_the_middle_say_the_same(strategy, first, start):
    name, values = STRATEGIES[strategy]
    model, streams = double("llama"), streams_of(RAGGED)
    plan, engine = tiny.plan(model, name, 9, 2, **values), Parallel(model, 13, side_by_side=3)
    whole, rest = together(engine, plan, streams), together(engine, plan, streams, first, start)
    assert sorted(rest) == list(range(first, len(streams)))
    for index, found in rest.items():
        assert (found - whole[index][start if index == first else 0 :]).abs().max() <= 1e-12


@pytest.mark.parametrize("make", [Stepwise, Recompute, lambda model: Recompute(model, batched=True)])
def test_other_engines_read_one_after_the_other(make):
    model, streams = double("llama"), streams_of((12, 2, 19))
    engine = make(model)
    plan = tiny.plan(model, "windowed" if isinstance(engine, Stepwise) else "recompute", 6, 0)
    found, rest = together(engine, plan, streams), together(engine, plan, streams, 1)
    for index, stream in enumerate(streams):
        wanted = [x for steps in engine.run(plan, stream) for x in steps.nll]
        assert found[index].tolist() == wanted
    assert rest[2].tolist() == found[2].tolist()


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=12), chunk=st.integers(1, 100))
def test_a_batch_is_fed_whole_and_little_beyond_the_ends_of_its_streams(lengths, chunk):
    lengths = sorted(lengths, reverse=True)
    found = list(pieces(lengths, chunk))
    assert [p.begin for p in found] == [0, *(p.end for p in found[:-1])]
    assert found[-1].end == lengths[0]
    for piece in found:
        fed = piece.rows * (piece.end - piece.begin)
        assert piece.end - piece.begin <= chunk
        assert [length > piece.begin for length in lengths] == [i < piece.rows for i in range(len(lengths))]
        beyond = sum(max(0, piece.end - length) for length in lengths[: piece.rows])
        assert 8 * beyond <= fed


@given(lengths=st.lists(st.integers(0, 300), max_size=40), most=st.integers(1, 900))
def test_batches_hold_every_stream_once_the_longest_first_and_no_more_than_fit(lengths, most):
    found = list(batches(lengths, lambda length: max(1, most // length)))
    assert sorted(i for batch in found for i in batch) == [i for i, n in enumerate(lengths) if n]
    for batch in found:
        mine = [lengths[i] for i in batch]
        assert mine == sorted(mine, reverse=True)
        assert len(batch) <= max(1, most // mine[0])


def test_the_batch_fits_the_free_memory(monkeypatch):
    model = tiny.shared("llama")
    plan = tiny.plan(model, "transformers")

    class Free:
        available = 2**40

    monkeypatch.setattr("psutil.virtual_memory", Free)
    plenty = Room.of(model, plan)
    assert plenty.streams(plan, 4, plenty.chunk, 100) == 20  # 2,048 tokens at once
    assert plenty.streams(plan, 4, plenty.chunk, 10**6) == 1
    Free.available = 8 * 2**20
    little = Room.of(model, plan)
    assert little.streams(plan, 4, little.chunk, 100) < 20
    assert little.streams(plan, 4, 16, 10**5) == 1


def test_a_little_more_or_less_memory_changes_no_batch(monkeypatch):
    """What is cut differently rounds differently."""
    model = tiny.shared("llama")
    plan = tiny.plan(model, "transformers")

    class Free:
        available = 0

    monkeypatch.setattr("psutil.virtual_memory", Free)
    found = set()
    for available in range(10 * 2**20, 18 * 2**20, 2**18):
        Free.available = available
        room = Room.of(model, plan)
        found.add((room.chunk, room.tokens, room.streams(plan, 4, 16, 1000)))
    assert len(found) <= 6


def test_memory_that_torch_keeps_of_earlier_runs_is_free(monkeypatch):
    """A sweep keeps some for every size of chunk: without it the last runs would be cut into small pieces."""
    monkeypatch.setattr("sinkbench.engines.chunks.device_of", lambda model: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 10000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 8500)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 500)
    assert chunks._free(tiny.shared("llama")) == 9000
