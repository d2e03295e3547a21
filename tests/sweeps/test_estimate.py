"""Estimates of memory and time: against what is counted by hand, and against what runs measured."""

import json
import re
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from golden import DATA, GOLDEN, ROOT, golden_options
from tiny import HYBRID, STREAMABLE, plan

from sinkbench.cache.stream import StreamCache
from sinkbench.config import ModelSource, RunConfig
from sinkbench.engines.lanes import LANES
from sinkbench.errors import UserError
from sinkbench.models.embedded import source_files
from sinkbench.models.loading import locate
from sinkbench.models.sizes import ModelSizes, read_sizes, sizes_of
from sinkbench.sweeps import device as module
from sinkbench.sweeps.device import Device, bandwidth, device_for, matrix_rate
from sinkbench.sweeps.estimate import Estimate, estimate
from sinkbench.sweeps.experiment import read_experiments
from sinkbench.sweeps.lengths import BYTES_A_TOKEN

GIB = 2**30
# DESIGN's numbers for one H200: bytes a second, and operations a second in bfloat16 and in float32
H200 = Device("cuda", 140 * GIB, 4.3e12, 707e12)
H200_FLOAT32 = Device("cuda", 140 * GIB, 4.3e12, 50e12)


def shape(stem: str) -> ModelSizes:
    (found,) = read_experiments(ROOT / "experiments" / f"{stem}.toml").shapes.values()
    return found


def options(engine: str = "stepwise", experiment: str = "attention_sinks", **more: Any) -> RunConfig:
    bits = {f"load_in_{more.pop('quantization')}": True} if more.get("quantization") else {}
    more = {
        "dtype": "bfloat16",
        "model_name_or_path": "any",
        **bits,
        **{k: v for k, v in more.items() if v is not None},
    }
    return RunConfig(engine=engine, experiment=experiment, **more)


def gib(stem: str, **more: Any) -> float:
    return estimate(options(**more), shape(stem), H200).vram_bytes / GIB


# Memory


@pytest.mark.parametrize(
    ("stem", "allocated"),  # GiB, the last rows of attention_sinks.csv that the attention_sinks benchmark published
    [
        ("llama_2_7b", 13.12),
        ("falcon_7b", 12.97),
        ("mpt_7b", 12.89),
        ("pythia_6_9b", 13.41),
        ("mistral_7b", 14.12),
        ("gptj_6b", 11.84),
        ("qwen_7b", 14.96),
        ("stablelm_3b", 5.56),
        ("yi_6b", 11.92),
    ],
)
def test_a_cut_cache_takes_the_memory_that_the_seed_measured(stem: str, allocated: float) -> None:
    assert gib(stem, dtype="float16") == pytest.approx(allocated, rel=0.05)


def test_dense_memory_grows_as_the_seed_measured_it() -> None:
    rows = pd.read_csv(DATA / "llama_2_7b" / "transformers.csv").set_index("input_length")["cuda_vram_allocated"]
    for tokens in (1000, 3000, 6000):
        estimated = gib("llama_2_7b", experiment="transformers", num_tokens=tokens, dtype="float16")
        assert estimated == pytest.approx(rows[tokens + 1], rel=0.05)


def test_dense_memory_grows_in_blocks_and_a_window_does_not() -> None:
    dense = [gib("llama_2_7b", experiment="transformers", num_tokens=n) for n in (1, 1024, 1025, 8192)]
    assert dense[0] == dense[1]
    assert dense[2] - dense[1] == pytest.approx(0.5)  # 1024 tokens of 32 layers, 2 x 4096 numbers each, 2 bytes
    assert dense[3] - dense[1] == pytest.approx(7 * 0.5)
    assert gib("llama_2_7b", num_tokens=8192) == gib("llama_2_7b", num_tokens=10**6)


@pytest.mark.parametrize("experiment", ["transformers", "windowed", "attention_sinks"])
@pytest.mark.parametrize(
    "family", ["llama", "falcon", "falcon-grouped", "gptj", "mistral", "gemma3", "gpt_oss", "gemma2"]
)
def test_layers_keep_what_the_cache_keeps(family: str, experiment: str) -> None:
    model = STREAMABLE[family]()
    cache = StreamCache(model, plan(model, experiment, 16))
    model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)
    a_token = [4 * layer.keys.shape[1] * (layer.keys.shape[3] + layer.values.shape[3]) for layer in cache.kept]
    held = [(layer.policy.window or 1023) + 1 for layer in cache.kept]  # the token itself joins what is kept
    expected = sum(size * count for size, count in zip(a_token, held, strict=True))
    found = sizes_of(model)
    sizes = {"num_tokens": 1024, "dtype": "float32"}
    with_cache = estimate(options("stepwise", experiment, window_size=16, **sizes), found, H200)
    without = estimate(options("stepwise", "recompute", window_size=1, **sizes), found, H200)
    assert with_cache.vram_bytes - without.vram_bytes == expected


def test_quantised_weights_take_their_share() -> None:
    full, eight, four = (gib("llama_2_7b", quantization=q) for q in (None, "8bit", "4bit"))
    linear = 2 * (6_738_415_616 - 2 * 32000 * 4096) / GIB  # what is not an embedding table or the head
    assert full - eight == pytest.approx(linear / 2)
    assert full - four == pytest.approx(linear * (1 - 0.5625 / 2))


def test_chunks_are_as_the_parallel_engine_takes_them() -> None:
    small = Device("cuda", 16 * GIB, 4.3e12, 707e12)
    both = [estimate(options("parallel"), shape("llama_2_7b"), d).vram_bytes for d in (small, H200)]
    assert both[0] < both[1]
    fixed = [estimate(options("parallel", chunk_size=256), shape("llama_2_7b"), d).vram_bytes for d in (small, H200)]
    assert fixed[0] == fixed[1] < both[0]


def test_rows_of_scores_take_their_share_of_a_chunk_and_their_time() -> None:
    scored = estimate(options("parallel", "h2o", chunk_size=256), shape("llama_2_7b"), H200)
    by_position = estimate(options("parallel", "windowed", chunk_size=256), shape("llama_2_7b"), H200)
    rows = 256 * 3 * 4 * 32 * (1024 + 1024)  # float32, three times, of 32 heads: held entries, and the largest chunk's
    states = 256 * 2 * (12 * 4096 + 4 * 11008)
    spare = 32 * 2 * 2 * 4096 * 256  # slots for keys and values that a strip has beside its window
    assert scored.vram_bytes - by_position.vram_bytes == LANES * (rows + states) - states - spare
    assert scored.seconds > by_position.seconds


def test_what_the_engine_refuses_has_no_estimate() -> None:
    with pytest.raises(UserError, match="the parallel engine cannot run this"):
        estimate(options("parallel", "h2o", positions="cache"), shape("llama_2_7b"), H200)


# Time


def test_sizes_without_a_window_are_refused() -> None:
    with pytest.raises(UserError, match="must be larger than"):
        estimate(options(window_size=4), shape("llama_2_7b"), H200)


def measured(folder: str, experiment: str) -> dict[str, Any]:
    return json.loads((ROOT / "results" / folder / f"{experiment}.json").read_text())


@pytest.mark.parametrize(
    ("folder", "experiment"),
    [
        *(("h200/smollm2_135m_eviction/float32", name) for name in ("windowed", "attention_sinks", "pyramid")),
        ("benchmark/kjv", "transformers"),
    ],
)
def test_times_in_parallel_are_within_a_factor_of_two_of_those_on_an_h200(folder: str, experiment: str) -> None:
    record = measured(folder, experiment)
    reference = record["options"].get("reference")
    run = options("parallel", experiment, num_tokens=record["rows"], dtype="float32", reference=reference)
    seconds = estimate(run, shape("smollm2_135m"), H200_FLOAT32).seconds
    assert 1 / 2 < seconds / record["seconds"] < 2


def milliseconds_a_token(model: str, engine: str, experiment: str) -> float:
    """As estimated for an H200, without what happens once."""
    once, twice = (
        estimate(options(engine, experiment, num_tokens=n), shape(model), H200).seconds for n in (100_000, 200_000)
    )
    return (twice - once) / 100_000 * 1e3


@pytest.mark.parametrize(
    ("engine", "what"), [("stepwise", "stepwise, {}"), ("parallel", "parallel, {}, 65,536 tokens")]
)
@pytest.mark.parametrize("experiment", ["windowed", "attention_sinks"])
def test_a_seven_billion_model_is_within_a_factor_of_two_of_an_h200(experiment: str, engine: str, what: str) -> None:
    costs = json.loads((ROOT / "results" / "h200" / "llama_2_7b_speed.json").read_text())["costs"]
    (measured,) = [cost["ms"] for cost in costs if cost["what"] == what.format(experiment)]
    assert 1 / 2 < milliseconds_a_token("llama_2_7b", engine, experiment) / measured < 2


def steps_on_an_h200() -> dict[str, float]:
    """Milliseconds of a captured step, of models that there is an experiment for, as the table of shapes has them."""
    table = (ROOT / "results" / "h200" / "README.md").read_text().partition("| a step, ms |")[2]
    rows = re.findall(r"^\| (\S+-\d\S*b)(?: \(.*\))? \| \S+ \| \S+ \| (\S+) \|", table, re.MULTILINE | re.IGNORECASE)
    names = {re.sub(r"[-.]", "_", name.lower()).replace("gpt_j", "gptj"): float(step) for name, step in rows}
    return {name: step for name, step in names.items() if (ROOT / "experiments" / f"{name}.toml").exists()}


@pytest.mark.parametrize(("model", "measured"), steps_on_an_h200().items())
def test_a_captured_step_is_estimated_within_a_tenth(model: str, measured: float) -> None:
    assert milliseconds_a_token(model, "stepwise", "attention_sinks") == pytest.approx(measured, rel=0.1)


def test_captured_steps_were_measured_of_many_models() -> None:
    assert len(steps_on_an_h200()) >= 10


def test_what_costs_more_is_estimated_to_cost_more() -> None:
    llama = shape("llama_2_7b")

    def seconds(*what: Any, **more: Any) -> float:
        return estimate(options(*what, **more), llama, H200).seconds

    assert seconds("parallel") < seconds("stepwise") < seconds("stepwise", cuda_graphs=False)
    assert seconds("stepwise", "attention_sinks") < seconds("stepwise", "transformers")
    assert seconds("parallel", "attention_sinks") < seconds("parallel", "recompute")
    assert seconds("parallel", "recompute", window_size=256) < seconds("parallel", "recompute", window_size=1024)
    assert seconds("stepwise", num_tokens=8192) < seconds("stepwise", num_tokens=16384)


def test_a_mixture_reads_the_experts_that_a_token_meets_only() -> None:
    mixture = shape("gpt_oss_20b")
    everything = mixture.model_copy(update={"active_parameters": None})
    one, all_ = (estimate(options("parallel"), s, H200) for s in (mixture, everything))
    assert one.vram_bytes == all_.vram_bytes
    assert one.seconds < all_.seconds / 2


@pytest.fixture
def unmeasured() -> Iterator[None]:
    """Nothing that was measured at another moment, when other processes may have had the cores."""
    for measure in (bandwidth, matrix_rate):
        measure.cache_clear()
    yield
    for measure in (bandwidth, matrix_rate):
        measure.cache_clear()


def plain_bandwidth() -> float:
    matrix, vector = torch.full((2**13, 4096), 0.5), torch.full((4096,), 0.5)
    return matrix.nbytes / quickest(lambda: torch.mv(matrix, vector))


def plain_rate() -> float:
    square = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    return 2 * 1024**3 / quickest(lambda: square @ square)


def quickest(work: Callable[[], object]) -> float:
    """Seconds of the quickest of ten, by the standard library."""
    return min(timeit.repeat(work, number=1, repeat=10))


@pytest.mark.heavy  # alone on the machine: workers beside it want the same cores
@pytest.mark.parametrize(("measure", "reference"), [(bandwidth, plain_bandwidth), (matrix_rate, plain_rate)])
def test_a_device_is_measured_as_a_plain_loop_measures_it(unmeasured, measure, reference) -> None:
    """Within a factor of two. Each has ten looks, since other processes want the core too."""
    ours, plain = 0.0, 0.0
    for _ in range(10):
        measure.cache_clear()
        ours, plain = max(ours, measure("cpu", torch.float32)), max(plain, reference())
        if 1 / 2 < ours / plain < 2:
            return
    pytest.fail(f"{ours:.3g} a second, where a plain loop comes to {plain:.3g}")


def test_a_device_is_measured_once(unmeasured, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bandwidth("cpu", torch.float32), matrix_rate("cpu", torch.float32)
    monkeypatch.setattr(module, "_best", lambda work: pytest.fail("it was measured again"))
    assert first == (bandwidth("cpu", torch.float32), matrix_rate("cpu", torch.float32))


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("engine", "experiment", "tokens", "window"),
    [
        ("stepwise", "attention_sinks", 200, 128),
        ("stepwise", "transformers", 200, 128),
        ("parallel", "windowed", 4096, 1024),
        ("parallel", "transformers", 4096, 1024),
        ("parallel", "recompute", 150, 64),
        ("stepwise", "recompute", 100, 64),
    ],
)
def test_times_on_this_machine_are_within_a_factor_of_three(
    here, unmeasured, tmp_path: Path, engine: str, experiment: str, tokens: int, window: int
) -> None:
    """Three looks: other processes may have the cores while the one or the other is measured."""
    run = RunConfig(engine=engine, experiment=experiment, num_tokens=tokens, window_size=window)
    model = shape("smollm2_135m")
    line = ("--engine", engine, "--experiment", experiment, "--num-tokens", tokens, "--window-size", window)
    ratios = []
    for look in range(3):
        for measure in (bandwidth, matrix_rate):
            measure.cache_clear()
        estimated = estimate(run, model, device_for(run, model)).seconds
        assert here("run", *line, "--output-dir", tmp_path / str(look))[0] == 0
        seconds = json.loads((tmp_path / str(look) / f"{experiment}.json").read_text())["seconds"]
        ratios.append(estimated / seconds)
        if 1 / 3 < ratios[-1] < 3:
            return
    pytest.fail(f"estimated at {ratios} of what was measured")


# Shapes


def test_a_shape_is_read_from_a_configuration_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    whole = read_sizes(locate(ModelSource(str(GOLDEN / "llama"))))
    assert read_sizes(locate(ModelSource(str(tmp_path / "config.json"), random_weights=True))) == whole
    assert whole.parameters == sum(p.numel() for p in _golden().parameters())


def test_a_shape_that_cannot_be_had_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no model folder"):
        read_sizes(locate(ModelSource("./nowhere")))
    with pytest.raises(UserError, match=r"configuration of .*cannot be read") as error:
        read_sizes(locate(ModelSource(str(DATA / "golden"))))
    assert "\n" not in str(error.value)


def test_experts_are_told_from_what_every_token_meets() -> None:
    model = HYBRID["gpt_oss"]()
    found = sizes_of(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert found.active_parameters == found.parameters - experts // 2  # two of four
    assert not found.plain_attention


def _golden() -> torch.nn.Module:
    from sinkbench.models.loading import load_model

    return load_model(locate(ModelSource(golden_options("llama")[1])))


def test_a_reference_has_a_cache_and_forwards_of_its_own() -> None:
    def found(**more: Any) -> Estimate:
        return estimate(options("parallel", num_tokens=65536, **more), shape("llama_3_1_8b"), H200)

    alone, dense = found(), found(experiment="transformers")
    beside = found(reference="transformers")
    assert beside.seconds == pytest.approx(alone.seconds + dense.seconds)
    assert beside.vram_bytes - alone.vram_bytes == 65536 * 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize("engine", ["parallel", "stepwise"])
def test_a_reference_ends_where_it_would_be_read_beyond_what_the_model_was_trained_for(engine: str) -> None:
    def found(tokens: int, **more: Any) -> Estimate:
        return estimate(options(engine, num_tokens=tokens, cuda_graphs=False, **more), shape("llama_2_7b"), H200)

    alone, trained = found(65536), found(4096, experiment="transformers")
    beside = found(65536, reference="transformers")
    assert beside.seconds == pytest.approx(alone.seconds + trained.seconds)
    assert beside.vram_bytes - alone.vram_bytes == 4096 * 2 * 32 * 32 * 128 * 2
    # one that never looks back so far is read to the end
    window, own = {"window_size": 1024}, {"reference": "windowed"}
    assert found(65536, **window, **own).seconds == pytest.approx(
        found(65536, **window).seconds + found(65536, experiment="windowed", **window).seconds
    )


def test_a_reference_is_counted_whole_where_nobody_knows_what_the_model_was_trained_for() -> None:
    unknown = shape("llama_2_7b").model_copy(update={"context_length": None})
    whole, ended = (
        estimate(options("parallel", num_tokens=65536, reference="transformers"), one, H200)
        for one in (unknown, shape("llama_2_7b"))
    )
    assert whole.vram_bytes - ended.vram_bytes == (65536 - 4096) * 2 * 32 * 32 * 128 * 2


# How much is read


def seconds(**more: Any) -> float:
    return estimate(options("parallel", dtype="bfloat16", **more), shape("llama_2_7b"), H200).seconds


def test_a_protocol_costs_what_its_windows_feed() -> None:
    def of(protocol: str, **more: Any) -> Estimate:
        line = {"experiment": "transformers", "protocol": protocol, "num_tokens": 65535, "context_length": 2048}
        return estimate(options("parallel", **line, **more), shape("llama_2_7b"), H200)

    disjoint, dense = of("windows"), seconds(experiment="transformers", num_tokens=65535)
    assert disjoint.seconds < dense  # 65,536 keys are more than 2,048
    assert of("strided", stride=1024).seconds == pytest.approx(2 * disjoint.seconds, rel=0.1)
    assert of("strided", stride=2048).seconds == pytest.approx(disjoint.seconds, rel=0.02)
    assert of("rolling").seconds == pytest.approx(disjoint.seconds, rel=0.02)
    assert of("llamacpp").seconds < disjoint.seconds  # half of its predictions pass the head
    cache = 65536 * 2 * 32 * 32 * 128 * 2
    whole = estimate(options("parallel", experiment="transformers", num_tokens=65535), shape("llama_2_7b"), H200)
    assert disjoint.vram_bytes < whole.vram_bytes - cache / 2


def test_documents_of_the_library_are_as_long_as_its_files() -> None:
    line = {"documents": True, "dataset_name": "stdlib", "num_tokens": 10**6}
    files = [len(text.encode()) for _, text in source_files()]
    one_stream = seconds(num_tokens=round(sum(files) / BYTES_A_TOKEN))
    assert seconds(**line) == pytest.approx(one_stream, rel=0.5)
    assert seconds(**line, num_samples=10) < seconds(**line, num_samples=100) < seconds(**line)
    assert seconds(**line | {"num_tokens": 100}) < seconds(**line) / 10


def test_documents_of_unknown_length_are_as_long_as_they_may_be() -> None:
    line = {"documents": True, "dataset_name": "some/dataset", "num_tokens": 4096}
    assert seconds(**line, num_samples=7) == pytest.approx(7 * seconds(num_tokens=4096))
