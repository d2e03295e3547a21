"""Strategies that score their entries, read in chunks: what the stepwise engine evicts and says, at every token.

The stepwise engine is held against a brute-force oracle in test_scored.py.
"""

import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import pytest
import tiny
import torch
from evictions import RULES, read
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbench import compilers
from sinkbench.attention import patterns
from sinkbench.engines.choice import choose_engine
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise
from sinkbench.errors import UserError

FAMILIES = [family for family in tiny.STREAMABLE if family not in ("qwen3_next", "dynamic", "longrope")]


@cache
def double(family):
    """In float64; gpt-oss has no such kernels for its experts."""
    model = tiny.STREAMABLE[family]()
    return model if family == "gpt_oss" else model.double()


def agree(model, plan, stream, chunk):
    nll, evictions = read(Stepwise(model), plan, stream)
    chunked, same = read(Parallel(model, chunk), plan, stream)
    assert same == evictions
    assert (chunked - nll).abs().max() <= (1e-9 if model.dtype == torch.float64 else 2e-4)


def combinations():
    """Every family with a rule that looks at attention and one that looks at keys, a few with all; others ``heavy``."""
    for family in FAMILIES:
        for rule in RULES:
            light = family in tiny.FEW or rule in ("h2o", "keydiff")
            yield pytest.param(family, rule, marks=() if light else pytest.mark.heavy)


@pytest.mark.parametrize(("family", "rule"), combinations())
def test_every_family_evicts_the_same_as_token_by_token(family, rule):
    name, parameters, _ = RULES[rule]
    model = double(family)
    agree(model, tiny.plan(model, name, 9, 2, recent=3, **parameters), tiny.tokens(60), 13)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_the_window_the_chunk_and_the_protections(data):
    name, parameters, _ = RULES[data.draw(st.sampled_from(sorted(RULES)))]
    window = data.draw(st.integers(2, 24))
    sinks = data.draw(st.integers(0, window - 1))
    recent = data.draw(st.integers(0, window - sinks - 1))
    chunk, length, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70)), data.draw(st.integers(0, 99))
    model = double("llama")
    agree(model, tiny.plan(model, name, window, sinks, recent=recent, **parameters), tiny.tokens(length, seed), chunk)


@pytest.mark.parametrize("kv_format", ["q8_0", "q4_0", "fp8_e4m3"])
@pytest.mark.parametrize("rule", ["h2o", "keydiff"])
def test_formats_are_applied_before_anything_is_scored(rule, kv_format):
    model = tiny.build("llama", num_key_value_heads=2, head_dim=32).double()
    agree(model, tiny.plan(model, RULES[rule][0], 9, 1, recent=2, kv_format=kv_format), tiny.tokens(60), 17)


def chooses_as_the_score_does(model, rule, monkeypatch):
    name, parameters, _ = RULES[rule]
    stream, plan = tiny.tokens(90), tiny.plan(model, name, 12, 2, recent=3, **parameters)
    fast = read(Parallel(model, 29), plan, stream)
    monkeypatch.setattr(patterns, "scans_for", lambda kind: None)
    assert read(Parallel(model, 29), plan, stream)[1] == fast[1]


@pytest.mark.parametrize("rule", RULES)
def test_a_scan_of_its_own_chooses_as_the_score_does(rule, monkeypatch):
    chooses_as_the_score_does(double("llama"), rule, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_so_it_does_in_half_precision(rule, dtype, monkeypatch):
    chooses_as_the_score_does(tiny.build("llama", initializer_range=0.1).to(dtype), rule, monkeypatch)


def test_a_scan_that_cannot_be_compiled_is_taken_the_slow_way_with_one_line(monkeypatch):
    numba = pytest.importorskip("numba")

    @numba.njit
    def wrong(scores):
        return scores.nothing_of_this_name

    def newest(scores, *arrays, **limits):
        return wrong(scores.numpy())

    name, parameters, _ = RULES["tova"]
    model, stream = double("llama"), tiny.tokens(60)
    plan = tiny.plan(model, name, 12, 2, **parameters)
    wanted = read(Parallel(model, 29), plan, stream)[1]
    monkeypatch.setattr(patterns, "scans_for", lambda kind: SimpleNamespace(newest=newest))
    monkeypatch.setattr(compilers, "REFUSED", set())
    with pytest.warns(UserWarning, match="cannot be compiled") as lines:
        assert read(Parallel(model, 29), plan, stream)[1] == wanted
    assert len(lines) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_stream_taken_up_in_the_middle_says_the_same(rule):
    name, parameters, _ = RULES[rule]
    model, stream = double("llama"), tiny.tokens(70)
    plan = tiny.plan(model, name, 12, 2, recent=3, **parameters)
    whole, rest = read(Parallel(model, 16), plan, stream)[0], read(Parallel(model, 16), plan, stream, 37)[0]
    assert (rest - whole[37:]).abs().max() <= 1e-12


def test_ranks_that_depend_on_what_is_left_are_refused_in_one_line():
    model = tiny.shared("llama")
    with pytest.raises(UserError, match=r"rank.*--engine stepwise"):
        choose_engine(model, tiny.plan(model, "h2o", 9, 0, "cache"), "parallel")


@pytest.mark.parametrize("chunk", [1, 7, 40, 300])
@pytest.mark.parametrize("family", ["llama", "mpt", "gptj"])
def test_entries_that_are_stored_anew_are_read_in_the_version_of_each_token(family, chunk):
    model, stream = double(family), tiny.tokens(120)
    plan = tiny.plan(model, "transformers", kv_format="kivi2:group=8,residual=16")
    wanted, nll = read(Stepwise(model), plan, stream)[0], read(Parallel(model, chunk), plan, stream)[0]
    # the others' own attention, which single steps go through, has a softmax in float32
    assert (nll - wanted).abs().max() <= (1e-9 if family == "llama" else 2e-4)


FRESH = """
import torch
from sinkbench.attention.kernels import host
torch.set_num_threads(1)
died = torch.full((1, 4), 3)
limits = dict(n=3, held=1, first=1, window=2, sinks=0, recent=0)
host.fixed(torch.rand(1, 4), torch.arange(4)[None], died, tolerance=0.0, **limits)
print(torch.get_num_threads())
"""


@pytest.mark.heavy
def test_a_scan_leaves_the_number_of_threads_as_it_was():
    """Numba's first kernel of a process sets OpenMP's, for all libraries: on a busy machine all else took ten times."""
    pytest.importorskip("numba")
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
