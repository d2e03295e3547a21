"""Threads share a model: each call answers as it would alone, and what fails or ends leaves nothing behind."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import crowds
import pytest
import tiny
import torch
from dropin import GREEDY, SIZES, benchmark, nlls, some_families
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench import SinkCache, attention_sinks
from sinkbench.attention.redirection import attending
from sinkbench.cache.stream import StreamCache
from sinkbench.calls import standing_in
from sinkbench.engines.parallel import Parallel
from sinkbench.engines.stepwise import Stepwise


@pytest.mark.parametrize("family", ["gpt_neox", "gptj", "dynamic"])
def test_calls_of_many_threads_answer_as_each_alone(family):
    crowds.crowd(tiny.STREAMABLE[family](), 42)


@pytest.mark.heavy
@pytest.mark.parametrize("family", tiny.STREAMABLE)
def test_two_hundred_calls_in_fresh_processes(family):
    paths = os.pathsep.join([p for p in sys.path if p])
    command, env = [sys.executable, crowds.__file__, "200", family], {**os.environ, "PYTHONPATH": paths}
    for _ in range(3):
        done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gptj", "mpt", "dynamic"])
def test_calls_of_many_threads_answer_as_each_alone_on_cuda(family):
    crowds.crowd(tiny.STREAMABLE[family]().cuda(), 70)


@some_families
def test_while_a_call_is_within_its_attention_others_find_the_model_as_it_was(family):
    model, stream = tiny.STREAMABLE[family](), tiny.tokens(40)
    plain, before = nlls(model, stream), crowds.state(model)
    cache = StreamCache(model, tiny.plan(model, "attention_sinks", 16))
    with attending(model, cache), ThreadPoolExecutor(1) as other:
        assert model.config._attn_implementation == "sinkbench"
        assert other.submit(lambda: model.config._attn_implementation).result() in ("sdpa", "eager")
        assert torch.equal(other.submit(nlls, model, stream).result(), plain)
        for twin in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config)), copy.copy(model.config)):
            assert type(twin) is AutoConfig.for_model(twin.model_type).__class__
            assert twin._attn_implementation != "sinkbench"
    assert crowds.state(model) == before


def test_models_of_one_configuration_keep_apart():
    one = tiny.ROTARY["gpt_neox"]()
    other = AutoModelForCausalLM.from_config(one.config).eval()
    assert other.config is one.config
    stream = tiny.tokens(60)
    expected = nlls(other, stream)
    with attention_sinks(one, **SIZES), ThreadPoolExecutor(4) as pool:
        cut = nlls(one, stream)
        jobs = [pool.submit(nlls, model, stream) for _ in range(20) for model in (one, other)]
        for job, wanted in zip(jobs, [cut, expected] * 20):
            assert torch.equal(job.result(), wanted)


def test_each_thread_has_the_sizes_of_its_own_context():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(60)
    sizes = [(4, 12), (1, 20), (0, 8), (2, 30)]
    wanted = [benchmark(model, stream, *each) for each in sizes]
    meet = threading.Barrier(len(sizes))

    def within(each):
        with attention_sinks(model, attention_sink_size=each[0], attention_sink_window_size=each[1]):
            meet.wait()
            got = nlls(model, stream)
            meet.wait()
        return got

    before = vars(model).copy()
    with ThreadPoolExecutor(len(sizes)) as pool:
        for got, expected in zip(pool.map(within, sizes), wanted):
            assert (got - expected).abs().max() < 2e-4
    assert vars(model) == before


def test_a_thread_that_a_context_starts_has_its_strategy():
    model, prompt, made = tiny.ROTARY["llama"](), tiny.tokens(30)[None], []
    with attention_sinks(model, **SIZES):
        alone = model.generate(prompt, max_new_tokens=8, **GREEDY)
        thread = threading.Thread(target=lambda: made.append(model.generate(prompt, max_new_tokens=8, **GREEDY)))
        thread.start()
        thread.join()
    assert torch.equal(made[0], alone)


def test_caches_come_and_go_on_many_threads_and_leave_nothing():
    model = tiny.ROTARY["llama"]()
    before = vars(model).copy()

    def come_and_go(number):
        for _ in range(10):
            SinkCache(model, attention_sink_window_size=number + 1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(16)))
    assert vars(model) == before


@pytest.mark.parametrize("engine", [Stepwise, Parallel])
def test_engines_on_many_threads_share_a_model(engine):
    model, plain = tiny.ROTARY["gptj"](), tiny.tokens(50, seed=1)
    plan, before = tiny.plan(model, "h2o", 16, positions="text"), crowds.state(model)
    streams = [tiny.tokens(40 + n, seed=n) for n in range(6)]
    run = lambda stream: [nll for step in engine(model).run(plan, stream) for nll in step.nll]  # noqa: E731
    alone, dense = [run(stream) for stream in streams], nlls(model, plain)
    with ThreadPoolExecutor(4) as pool:
        together, denses = pool.map(run, streams), [pool.submit(nlls, model, plain) for _ in range(6)]
        for one, other in zip(alone, together):
            assert one == pytest.approx(other, abs=1e-5)
        assert all((job.result() - dense).abs().max() < 1e-4 for job in denses)
    assert crowds.state(model) == before


def test_one_name_is_registered_and_stays_the_only_one():
    assert [name for name in ALL_ATTENTION_FUNCTIONS._global_mapping if "sinkbench" in name] == ["sinkbench"]


def test_a_method_that_another_stood_before_ours_stays_when_ours_goes():
    class Thing:
        def say(self):
            return "own"

    thing = Thing()
    with standing_in({(thing, "say"): lambda own: own() + "!"}):
        assert thing.say() == "own!"
        inner = thing.say
        thing.say = lambda: f"<{inner()}>"
    assert thing.say() == "<own>"
