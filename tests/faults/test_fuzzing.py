"""Whatever the input: one line where it is refused, no traceback, no hang, and nothing changed that should not be.

A few examples each in ``make test``, hundreds in ``make test-all``. ``--seed any`` tries others.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import huggingface_hub.constants
import pytest
from fuzzing import (
    NUMBERS,
    SCALARS,
    TEXTS,
    VALUES,
    bytes_edited,
    cells_edited,
    command,
    contents,
    edited,
    json_of,
    refused_or_done,
    tried,
)
from golden import GOLDEN, golden_options
from hypothesis import strategies as st

from sinkbench.cli.options import flag
from sinkbench.config import ChatConfig, GenerateConfig, RunConfig, options_of
from sinkbench.errors import UserError
from sinkbench.results.columns import MEASURES, SEED_COLUMNS, features
from sinkbench.strategies.registry import BUILTIN
from sinkbench.sweeps.launchers.transfer import checksum, place, work

pytestmark = pytest.mark.timeout(3600)

EFFORT = pytest.mark.parametrize(
    "effort", [pytest.param(1, id="a_few"), pytest.param(50, id="many", marks=pytest.mark.heavy)]
)
LLAMA = GOLDEN / "llama"
TOKENS = json.loads((LLAMA / "tokens.jsonl").read_text().splitlines()[0])["input_ids"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Without the Hub, and in a folder of its own: names are not looked up, and what is written is seen."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")


def fresh(folder: Path) -> Path:
    """``folder``, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# Command lines

SPOKEN = st.one_of(TEXTS, NUMBERS.map(str), st.sampled_from(["pipe", "results", "a.html", "a.png", str(LLAMA)]))
GIVEN = {
    "run": [*map(flag, options_of(RunConfig)), "--config", "--no-streaming", "--no-cuda-graphs"],
    "generate": list(map(flag, options_of(GenerateConfig))),
    "chat": list(map(flag, options_of(ChatConfig))),
    "sweep": ["--dry-run", "--output-dir", "--retries", "--launcher", "--overwrite"],
    "plot": ["--output-dir", "--features", "--title", "--log-perplexity-limit", "--skip-first", "--output"]
    + ["--baseline", "--ngram", "--tokens"],
    "compare": ["--baseline", "--by", "--ngram", "--tokens", "--key-tokens", "--format"],
    "report": ["--output"],
    "strategies": ["--format"],
    "speed": ["--model-name-or-path", "--dtype", "--window-size", "--steps", "--num-tokens", "--output"],
}
FIRST = {
    "run": [*golden_options("llama"), "--num-tokens", "5", "--output-dir", "out"],
    "generate": ["--model-name-or-path", str(LLAMA), "--max-new-tokens", "3", "--output-dir", "out"],
    "chat": ["--model-name-or-path", str(LLAMA)],
    "speed": ["--model-name-or-path", "nowhere"],
}


@st.composite
def lines(draw):
    name = draw(st.sampled_from(sorted(GIVEN)))
    given = st.tuples(
        st.sampled_from([*GIVEN[name], "--debugging", ""]), SPOKEN, st.sampled_from(["two", "one", "none"])
    )
    said = []
    for option, value, how in draw(st.lists(given, min_size=1, max_size=2)):
        said += {"two": [option, value], "one": [f"{option}={value}"], "none": [option]}[how] if option else [value]
    return [name, *FIRST.get(name, []), *(x for x in said if x != "--debug")]


@EFFORT
def test_whatever_the_line_says(effort, tmp_path):
    tried(20 * effort, lines(), lambda line: refused_or_done(tmp_path, *line, typed="hello\n/stats\n/reset\n/x\n"))


# Experiment files

KEYS = [*options_of(RunConfig), "name", "shape", "set", "what", "window-size", "output-dir"]
STRATEGIES = st.sampled_from(sorted(BUILTIN))
AXES = st.one_of(VALUES, st.lists(SCALARS, max_size=3), STRATEGIES.map(lambda name: {"name": name}))


def toml(value) -> str:
    """``value`` as TOML, as far as there is any."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return json.dumps(value) if isinstance(value, str) else repr(value)


TABLES = st.dictionaries(st.sampled_from(KEYS), st.one_of(AXES, STRATEGIES), max_size=4)
SIZES = {
    **{"parameters": 10**8, "layers": 3, "hidden_size": 64, "intermediate_size": 128, "heads": 4, "kv_heads": 2},
    **{"head_dim": 16, "vocab_size": 512},
}


@st.composite
def files(draw):
    table = {"model_name_or_path": str(LLAMA), "dataset_name": str(LLAMA / "tokens.jsonl"), "num_tokens": 5}
    table |= {"data_column": "input_ids", "output_dir": "out"} | draw(TABLES)
    if draw(st.booleans()):
        table["shape"] = draw(edited(SIZES))
    data = "".join(f"{key} = {toml(value)}\n" for key, value in table.items()).encode("utf-8", "surrogatepass")
    return draw(bytes_edited(data)) if draw(st.integers(0, 3)) == 0 else data


@EFFORT
def test_whatever_an_experiment_file_says(effort, tmp_path):
    def check(data):
        (tmp_path / "e.toml").write_bytes(data)
        refused_or_done(tmp_path, "sweep", "e.toml", "--dry-run")
        fresh(tmp_path / "out")
        refused_or_done(tmp_path, "run", "--config", "e.toml", *FIRST["run"])

    tried(6 * effort, files(), check)


# Datasets

CELLS = st.one_of(
    VALUES, st.lists(SCALARS, max_size=4), st.lists(st.integers(-3, 600), max_size=40), st.just(TOKENS[:30]), st.text()
)
ROWS = st.lists(
    st.one_of(st.builds(lambda cell: json_of({"input_ids": cell}), CELLS), VALUES.map(json_of), st.binary(max_size=9)),
    max_size=3,
)


@EFFORT
def test_whatever_a_dataset_holds(effort, tmp_path):
    def check(case):
        rows, (name, column) = case
        fresh(tmp_path / "data")
        (tmp_path / "data" / name).write_bytes(b"\n".join(rows) + b"\n")
        fresh(tmp_path / "out")
        more = ["--dataset-name", f"data/{name}", "--data-column", column, "--num-samples", 3]
        answer = refused_or_done(tmp_path, "run", *FIRST["run"], *more)
        if answer.status == 0:
            assert contents(tmp_path / "out")

    names = st.sampled_from(["t.jsonl", "t.json", "t[1]*.jsonl", "a::b.jsonl", "t.txt", "t.csv", "t.parquet"])
    columns = st.sampled_from(["input_ids", "text", "input_ids", "a"])
    tried(15 * effort, st.tuples(ROWS, st.tuples(names, columns)), check)


# Models

CONFIG = json.loads((LLAMA / "config.json").read_text())
DECIDING = {
    "model_type": ["llama", "mistral", "gemma3_text", "gpt2", "falcon", "bloom", "t5", "bert", "", "x"],
    "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 2, [], "x", ["linear_attention"] * 3],
    "rope_scaling": [{"rope_type": "yarn"}, {"rope_type": "dynamic", "factor": 0}, {"type": "x"}, {}, "x"],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 0}, {}, {"rope_type": "llama3", "factor": -1}],
    "hidden_act": ["gelu", "x", None],
    "torch_dtype": ["float16", "int8", "x", None],
    "architectures": [["LlamaForCausalLM"], ["X"], [], None],
    "quantization_config": [{"quant_method": "gptq"}, {"quant_method": "x"}, {}],
    "auto_map": [{"AutoConfig": "a.B"}],
}


@st.composite
def configs(draw):
    config = dict(CONFIG)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(
            st.sampled_from([*CONFIG, *DECIDING, "sliding_window", "head_dim", "attention_chunk_size", "mlp_bias"])
        )
        config[key] = draw(st.one_of(st.sampled_from(DECIDING[key]), VALUES) if key in DECIDING else VALUES)
    return json_of(config) if draw(st.integers(0, 5)) else draw(bytes_edited(json_of(config)))


@EFFORT
def test_whatever_a_configuration_says(effort, tmp_path):
    def check(data):
        model = fresh(tmp_path / "model")
        (model / "config.json").write_bytes(data)
        shutil.copy(LLAMA / "model.safetensors", model)
        for more in (
            ["--model-name-or-path", "model"],
            ["--model-name-or-path", "model/config.json", "--random-weights"],
        ):
            fresh(tmp_path / "out")
            refused_or_done(tmp_path, "run", *FIRST["run"], *more)

    tried(10 * effort, configs(), check)


# Results

COLUMNS = list(MEASURES)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder of two runs that have ended."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("attention_sinks", "windowed"):
        command("run", *golden_options("llama"), "--experiment", name, "--num-tokens", 60, "--output-dir", folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ask_all(folder: Path) -> None:
    """Everything that reads results, of what lies in ``out``."""
    line = [*golden_options("llama"), "--num-tokens", 60, "--output-dir", "out", "--resume"]
    made = {"report.html", "report.md", "perplexity_kv_cache.svg"}
    before = contents(folder / "out")
    refused_or_done(folder, "compare", "out")
    refused_or_done(folder, "plot", *PLOT, "--output-dir", "out", "--output", "out/perplexity_kv_cache.svg")
    refused_or_done(folder, "report", "out")
    after = contents(folder / "out")
    assert {name: data for name, data in after.items() if name not in made} == before
    refused_or_done(folder, "run", *line)


PLOT = ["--features", "perplexity", "kv_cache", "--skip-first", 0, "--log-perplexity-limit", 0]


@EFFORT
def test_whatever_was_done_to_rows(effort, tmp_path, results):
    def check(rows):
        out = fresh(tmp_path / "out")
        for name, data in (results | {"attention_sinks.csv": rows}).items():
            (out / name).write_bytes(data)
        ask_all(tmp_path)

    whole = results["attention_sinks.csv"]
    tried(2 * effort, st.one_of(cells_edited(whole), cells_edited(whole), bytes_edited(whole)), check)


@EFFORT
def test_whatever_was_done_to_a_record(effort, tmp_path, results):
    def check(record):
        out = fresh(tmp_path / "out")
        for name, data in (results | {"attention_sinks.json": record}).items():
            (out / name).write_bytes(data)
        ask_all(tmp_path)

    whole = results["attention_sinks.json"]
    tried(2 * effort, st.one_of(edited(json.loads(whole)).map(json_of), bytes_edited(whole)), check)


# What workers send


@EFFORT
def test_whatever_a_worker_sends(effort, tmp_path):
    options = RunConfig(
        model_name_or_path=str(LLAMA),
        dataset_name=str(LLAMA / "tokens.jsonl"),
        data_column="input_ids",
        num_tokens=20,
        name="cell",
        output_dir=tmp_path / "there",
    )
    whole = work(options)

    def check(case):
        rows, record, sealed = case
        fresh(tmp_path / "there")
        sent = replace(whole, rows=rows, record=record, sha256=checksum(rows, record) if sealed else whole.sha256)
        try:
            place(sent, options)
        except UserError as error:
            assert "\n" not in str(error)
            assert contents(options.output_dir) == {}
            return
        assert options.csv.with_suffix(".json").exists()

    rows = st.one_of(st.just(whole.rows), cells_edited(whole.rows), bytes_edited(whole.rows), st.just(b""))
    records = edited(json.loads(whole.record)).map(json_of)
    records = st.one_of(st.just(whole.record), records, bytes_edited(whole.record), VALUES.map(json_of))
    tried(25 * effort, st.tuples(rows, records, st.sampled_from([True, True, True, False])), check)


# Figures

FINITE = st.one_of(
    st.floats(-1e150, 1e150), st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e150, -1e150, 5e-324, 1e-308, 2.0**53])
)
ABOVE_ZERO = st.one_of(st.floats(1, 1e4), st.floats(5e-324, 1.7e308), st.sampled_from([1.0, 5e-324, 1.7e308]))
NAMES = st.one_of(st.sampled_from(["a", "é", "$x$", "$\\frac", "[x]", "<b>", "_a", "a%", "日本", "-", "\\", "a\nb"]))


@st.composite
def drawn(draw):
    """Runs that can be drawn, whatever their numbers: names, rows and columns."""
    found = {}
    for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True)):
        rows = draw(st.integers(1, 12))
        extra = draw(st.lists(st.sampled_from([x for x in COLUMNS if x not in SEED_COLUMNS]), max_size=2, unique=True))
        columns = {
            column: draw(st.lists(ABOVE_ZERO if "ppl" in column else FINITE, min_size=rows, max_size=rows))
            for column in [*SEED_COLUMNS, *extra]
        }
        steps = draw(st.sampled_from([1, 1, 3, 10**7]))
        columns["input_length"] = [steps * (row + 1) for row in range(rows)]
        lines = [",".join(columns), *(",".join(map(repr, row)) for row in zip(*columns.values()))]
        found[name] = "\n".join(lines) + "\n"
    return found


@EFFORT
def test_whatever_is_drawn(effort, tmp_path):
    def check(case):
        runs, chosen, limit, title, suffix = case
        out = fresh(tmp_path / "out")
        for name, rows in runs.items():
            (out / f"{name}.csv").write_text(rows)
        line = ["plot", "--output-dir", "out", "--output", f"out/figure.{suffix}", "--skip-first", 0]
        line += ["--log-perplexity-limit", limit, *(["--title", title] if title is not None else [])]
        answer = refused_or_done(tmp_path, *line, "--features", *chosen)
        assert (out / f"figure.{suffix}").exists() == (answer.status == 0)
        refused_or_done(tmp_path, "report", "out")
        refused_or_done(tmp_path, "compare", "out")

    chosen = st.lists(st.sampled_from(sorted(features())), min_size=1, max_size=3)
    titles = st.one_of(st.none(), TEXTS.filter(lambda text: not re.search("[\0\ud800]", text)))
    limits = st.sampled_from([0, 5, 1e308, -1, 1e-300])
    tried(2 * effort, st.tuples(drawn(), chosen, limits, titles, st.sampled_from(["png", "svg", "pdf"])), check)
