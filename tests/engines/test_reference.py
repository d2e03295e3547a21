"""The divergence from a reference is that of the full distributions, by every engine; of itself there is none."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import shared

from sinkbench.cache.stream import StreamCache
from sinkbench.engines import head
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.divergence import divergence
from sinkbench.engines.forward import one_by_one
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.states import behind, together
from sinkbench.engines.streams import run_many
from sinkbench.errors import UserError

CLOSE = 1e-4
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
engines = pytest.mark.parametrize("engine", ["stepwise", "parallel"])


def measured(engine, model, plan, reference, stream, start=0, chunk=7):
    """All columns of a run, float64 ``(n,)`` each."""
    chosen = choose_engine(model, plan, engine, chunk=chunk, reference=reference)
    steps = list(chosen.run(plan, stream, start))
    assert steps[0].first == start + 1
    columns = {"nll": [nll for step in steps for nll in step.nll]}
    for name in steps[0].columns:
        columns[name] = [value for step in steps for value in step.columns[name]]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def on(device, model):
    """The model there, and not the one that tests share."""
    return model if device == "cpu" else deepcopy(model).to(device)


@torch.inference_mode()
def dense_logits(model, stream):
    return model(input_ids=stream[None, :-1].to(model.device), use_cache=False).logits[0].double().cpu()


@torch.inference_mode()
def recomputed_logits(model, stream, width):
    windows = [stream[max(0, t + 1 - width) : t + 1].to(model.device) for t in range(len(stream) - 1)]
    logits = [model(input_ids=window[None], use_cache=False).logits[0, -1:].double() for window in windows]
    return torch.cat(logits).cpu()


@torch.inference_mode()
def cached_logits(model, plan, stream):
    """Through our cache token by token, whose logits other tests hold against independent code."""
    cache = StreamCache(model, plan)
    with one_by_one(model, cache, len(stream)) as feed:
        tokens = stream[:-1].to(model.device)
        return torch.cat([feed(token[None]).logits[0, -1:].double() for token in tokens]).cpu()


def assert_diverges(found, q, p, stream):
    """By the definition, in float64, from full logits."""
    ln_q, ln_p = q.log_softmax(-1), p.log_softmax(-1)
    kl = (ln_p.exp() * (ln_p - ln_q)).sum(-1)
    assert (found["kl"] - kl).abs().max() <= CLOSE
    assert found["kl"].max() > 100 * CLOSE  # there is something to see
    assert torch.equal(found["same_top"], (q.argmax(-1) == p.argmax(-1)).double())
    labels = stream[1:, None]
    assert (found["reference_nll"] + ln_p.gather(1, labels)[:, 0]).abs().max() <= CLOSE
    assert (found["nll"] + ln_q.gather(1, labels)[:, 0]).abs().max() <= 3 * CLOSE


EVERY = {**{name: (lambda name=name: shared(name)) for name in tiny.FEW}, "gpt2": tiny.LEARNED["gpt2"]}


ALONE = {"qwen3_next", "gpt2"}  # read token by token only
BOTH = [(family, engine) for family in EVERY for engine in ("stepwise", "parallel")[: 1 if family in ALONE else 2]]


@devices
@pytest.mark.parametrize(("family", "engine"), BOTH)
def test_it_is_that_of_full_logits_of_transformers(family, engine, device):
    model, stream = on(device, EVERY[family]()), tiny.tokens(44)
    plan, reference = tiny.plan(model, "recompute", 9), tiny.plan(model, "transformers")
    found = measured(engine, model, plan, reference, stream)
    assert_diverges(found, recomputed_logits(model, stream, 9), dense_logits(model, stream), stream)
    back = measured(engine, model, reference, plan, stream)
    assert_diverges(back, dense_logits(model, stream), recomputed_logits(model, stream, 9), stream)


STRATEGIES = [
    *(("attention_sinks", "model"), ("windowed", "q8_0"), ("context_shift", "model"), ("pyramid", "fp8_e4m3")),
    *(("h2o", "model"), ("tova", "q4_0"), ("keydiff", "model"), ("random", "model"), ("transformers", "q4_0")),
    ("transformers", "kivi2:group=16,residual=16"),
]


PARAMETERS = {"pyramid": {"beta": 2}}


@pytest.fixture(scope="module")
def wide():
    """A model whose heads every format can store."""
    return tiny.build("llama", head_dim=32, **tiny.GROUPED)


def strategies():
    """By both engines; scans that have to be compiled for it are ``heavy``."""
    for strategy, kv_format in STRATEGIES:
        for engine in ("stepwise", "parallel"):
            compiles = engine == "parallel" and strategy in ("tova", "keydiff", "random")
            yield pytest.param(strategy, kv_format, engine, marks=pytest.mark.heavy if compiles else ())


@devices
@pytest.mark.parametrize(("strategy", "kv_format", "engine"), strategies())
def test_every_strategy_and_format_has_it(strategy, kv_format, engine, device, wide):
    wide, stream = on(device, wide), tiny.tokens(60)
    plan = tiny.plan(wide, strategy, 12, 2, kv_format=kv_format, **PARAMETERS.get(strategy, {}))
    found = measured(engine, wide, plan, tiny.plan(wide, "transformers"), stream, chunk=17)
    assert_diverges(found, cached_logits(wide, plan, stream), dense_logits(wide, stream), stream)


@devices
@engines
@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        *(("llama", name) for name in ("attention_sinks", "transformers", "h2o", "recompute", "pyramid")),
        *(("mpt", "attention_sinks"), ("gemma3", "attention_sinks"), ("dynamic", "windowed")),
    ],
)
def test_of_itself_it_is_exactly_0(family, strategy, engine, device):
    model = on(device, shared(family))
    plan = tiny.plan(model, strategy, 12, None, **PARAMETERS.get(strategy, {}))
    found = measured(engine, model, plan, plan, tiny.tokens(40), chunk=None)
    assert found["kl"].tolist() == [0.0] * 39
    assert found["same_top"].tolist() == [1.0] * 39
    assert torch.equal(found["nll"], found["reference_nll"])


@engines
@pytest.mark.parametrize("reference", ["windowed", "h2o", "transformers"])
def test_the_run_itself_is_what_it_is_without(reference, engine):
    model, stream = shared("falcon-alibi"), tiny.tokens(50)
    plan = tiny.plan(model, "attention_sinks", 12)
    alone = measured(engine, model, plan, None, stream)
    assert list(alone) == ["nll"]
    assert torch.equal(alone["nll"], measured(engine, model, plan, tiny.plan(model, reference, 20), stream)["nll"])


@engines
@pytest.mark.parametrize("strategy", ["attention_sinks", "h2o", "recompute"])
def test_a_stream_taken_up_in_the_middle_diverges_as_one_that_was_not(strategy, engine):
    model, stream = shared("llama"), tiny.tokens(60)
    plan = tiny.plan(model, strategy, 12, None)
    for reference in (tiny.plan(model, "transformers"), tiny.plan(model, "h2o", 9, 0)):
        whole = measured(engine, model, plan, reference, stream)
        rest = measured(engine, model, plan, reference, stream, start=23)
        for name, values in rest.items():
            assert values == pytest.approx(whole[name][23:], abs=1e-5)


def test_tables_of_positions_last_for_both_and_are_as_before_when_both_have_ended():
    model = tiny.build("gptj", rotary_dim=8, n_positions=32)
    table, stream = model.transformer.h[0].attn.embed_positions, tiny.tokens(90)
    plan, reference = tiny.plan(model, "attention_sinks", 8), tiny.plan(model, "transformers")
    wanted = measured("stepwise", model, reference, None, stream)["nll"]
    for engine in ("stepwise", "parallel"):
        found = measured(engine, model, plan, reference, stream)
        assert found["reference_nll"] == pytest.approx(wanted, abs=2e-4)
        assert model.transformer.h[0].attn.embed_positions is table


def test_logits_are_formed_a_slice_at_a_time_for_both(monkeypatch):
    model, stream = shared("llama"), tiny.tokens(60)
    plan, reference = tiny.plan(model, "windowed", 12), tiny.plan(model, "transformers")
    whole = measured("parallel", model, plan, reference, stream, chunk=64)
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * tiny.VOCABULARY * 5)
    shapes = []
    monkeypatch.setattr(
        head, "divergence", lambda q, p, labels: shapes.append(tuple(q.shape)) or divergence(q, p, labels)
    )
    sliced = measured("parallel", model, plan, reference, stream, chunk=64)
    assert max(shapes) == (5, tiny.VOCABULARY)
    for name, values in sliced.items():
        assert values == pytest.approx(whole[name], abs=1e-6)


def test_what_the_parallel_engine_cannot_read_as_a_reference_is_refused_in_one_line():
    model = shared("llama")
    with pytest.raises(UserError, match=r"^the parallel engine cannot run the reference: .*--engine stepwise"):
        choose_engine(model, tiny.plan(model, "windowed"), "parallel", reference=tiny.plan(model, "h2o", 9, 0, "cache"))


def test_steps_are_not_captured_and_a_line_says_so(monkeypatch):
    model, said = shared("llama"), []
    plan, reference = tiny.plan(model, "windowed"), tiny.plan(model, "transformers")
    monkeypatch.setattr("sinkbench.engines.captured.Captured.refuses", lambda self, plan: None)
    chosen = choose_engine(model, plan, "stepwise", note=said.append, reference=reference)
    assert type(chosen).__name__ == "Stepwise"
    assert len(said) == 1 and "--reference" in said[0]
    assert type(choose_engine(model, plan, "stepwise", note=said.append)).__name__ == "Captured"
    choose_engine(model, plan, "stepwise", cuda_graphs=False, note=said.append, reference=reference)
    assert len(said) == 1


@given(st.lists(st.integers(1, 9), min_size=1), st.integers(0, 30), st.integers(1, 40), st.integers(0, 99))
def test_pieces_of_two_are_cut_where_either_ends_and_where_the_second_is_none(lengths, start, size, until):
    total = sum(lengths)
    start = min(start, total - 1)
    states = torch.arange(total, dtype=torch.float32)[:, None]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    one = ((end - n, states[end - n : end]) for n, end in zip(lengths, ends, strict=True))
    other = ((begin, states[begin : begin + size]) for begin in range(0, total, size))
    read = list(together(behind(start, one), behind(start, other), until))
    assert [begin for begin, _, _ in read] == [int(ours[0]) for _, ours, _ in read]
    assert all((theirs is None) == (begin >= until) for begin, _, theirs in read)
    assert all(begin + len(ours) <= until for begin, ours, theirs in read if theirs is not None)
    assert all(torch.equal(ours, theirs) for _, ours, theirs in read if theirs is not None)
    assert torch.equal(torch.cat([ours for _, ours, _ in read]), states[start:])


@pytest.mark.parametrize(("until", "start"), [(1, 0), (13, 0), (13, 14), (16, 14), (38, 0)])
@pytest.mark.parametrize("strategy", ["attention_sinks", "recompute"])
@pytest.mark.parametrize("reference", ["transformers", "recompute"])
@engines
def test_behind_the_tokens_that_a_reference_reads_nothing_is_measured_against_it(
    engine, strategy, reference, start, until
):
    model, stream = shared("llama"), tiny.tokens(40)
    plan, beside = tiny.plan(model, strategy, 12), tiny.plan(model, reference, 9)
    wanted = measured(engine, model, plan, beside, stream)
    steps = list(choose_engine(model, plan, engine, chunk=8, reference=beside, until=until).run(plan, stream, start))
    assert [nll for step in steps for nll in step.nll] == pytest.approx(wanted["nll"][start:].tolist(), abs=1e-5)
    for name in ("kl", "same_top", "reference_nll"):
        found = [value for step in steps for value in step.columns.get(name, [None] * len(step.nll))]
        counted = max(0, until - start)
        assert found[:counted] == pytest.approx(wanted[name][start:until].tolist(), abs=1e-5)
        assert found[counted:] == [None] * (39 - start - counted)


LABELS = torch.tensor([1])


def kl(q, p):
    return divergence(torch.tensor([q]), torch.tensor([p]), LABELS)["kl"].item()


def test_small_divergences_are_not_lost_in_rounding_and_large_ones_do_not_overflow():
    torch.manual_seed(3)
    p = 5 * torch.randn(40, 50_000)
    q = p + 1e-4 * torch.randn_like(p)
    ln_p, ln_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    wanted = (ln_p.exp() * (ln_p - ln_q)).sum(-1)
    found = divergence(q, p, torch.zeros(40, dtype=torch.long))["kl"]
    assert found.min() >= 0
    assert (found / wanted - 1).abs().max() < 0.05  # of 5e-9
    assert kl([0.0, 900.0], [900.0, 0.0]) == 900.0
    assert kl([0.0, 90.0, 0.0], [0.0, 0.0, 90.0]) == pytest.approx(90.0)


def test_a_token_that_both_exclude_adds_nothing_and_one_that_the_run_alone_excludes_is_infinite():
    none = -math.inf
    assert kl([0.0, 1.0, none], [0.0, 1.0, none]) == 0.0
    assert kl([0.0, 0.0, none], [0.0, none, none]) == pytest.approx(math.log(2))
    assert kl([0.0, 0.0, none], [0.0, 0.0, 0.0]) == math.inf
    assert math.isnan(kl([0.0, math.nan, 0.0], [0.0, 0.0, 0.0]))
    assert math.isnan(kl([0.0, 0.0, 0.0], [0.0, math.nan, 0.0]))


@engines
def test_half_precision_is_measured_in_float32(engine):
    model = tiny.build("llama", **tiny.GROUPED).to(torch.bfloat16)
    stream = tiny.tokens(30)
    found = measured(engine, model, tiny.plan(model, "windowed", 8), tiny.plan(model, "transformers"), stream)
    assert found["kl"][:7].max() < 0.05 < found["kl"][12:].max()
    assert float(found["reference_nll"].sum()) != float(found["reference_nll"].bfloat16().sum())


@pytest.mark.parametrize("reference", ["transformers", "windowed", "recompute"])
def test_streams_side_by_side_diverge_each_as_alone(reference):
    model = tiny.build("llama").double()  # as engines round differently
    plan, beside = tiny.plan(model, "attention_sinks", 12), tiny.plan(model, reference, 9)
    streams = [tiny.tokens(n, seed) for seed, n in enumerate((40, 2, 55, 40, 31))]
    engine = Parallel(model, chunk=16, side_by_side=3, reference=beside)
    found = {}
    for index, steps in run_many(engine, plan, streams, first=1):
        found.setdefault(index, []).extend(steps.columns["kl"])
    assert list(found) == [1, 2, 3, 4]
    wanted = {index: measured("stepwise", model, plan, beside, streams[index])["kl"].tolist() for index in found}
    for index, values in found.items():
        assert values == pytest.approx(wanted[index], abs=1e-8)
    cut = {index: [] for index in found}
    for index, steps in run_many(replace(engine, until=20), plan, streams, first=1):
        cut[index].extend(steps.columns.get("kl", [None] * len(steps.nll)))
    for index, values in cut.items():
        assert values[:20] == pytest.approx(wanted[index][:20], abs=1e-8)
        assert values[20:] == [None] * (len(wanted[index]) - len(wanted[index][:20]))
