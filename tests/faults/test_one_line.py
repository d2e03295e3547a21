"""Whatever is wrong with a line, a name, a file or the output: one line that says it, and a status that is known."""

import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from answers import refused
from golden import GOLDEN, golden_options

from sinkbench.results.report import writing
from sinkbench.runs import run as runs

LLAMA = GOLDEN / "llama"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, with a pipe to which nobody writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("pipe", "pipe.toml", "pipe.csv", "pipe.jsonl", "pipe.html", "pipe.png", "pipe.py"):
        os.mkfifo(name)


def run(*more):
    return ["run", *golden_options("llama"), "--num-tokens", "5", "--output-dir", "out", *more]


# The last net


@pytest.fixture
def broken(monkeypatch):
    def fail(*asked):
        raise KeyError("a fault\nof ours")

    monkeypatch.setattr(writing, "write_report", fail)


def test_what_nobody_expected_is_one_line_that_asks_for_a_report_and_has_a_status_of_its_own(broken, here):
    status, _, error = here("report", "out")
    assert status == 70
    assert len(error.splitlines()) == 1
    for words in ("unexpected KeyError", "a fault", "report it", "--debug"):
        assert words in error


@pytest.mark.parametrize("line", [["--debug", "report", "out"], ["report", "out", "--debug"]])
def test_debug_anywhere_on_the_line_shows_where_it_comes_from(broken, here, line):
    with pytest.raises(KeyError):
        here(*line)


# Standard output


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    line = line.replace("sinkbench", f"{sys.executable} -m sinkbench")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env, timeout=60, check=False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["strategies", "--version"])
def test_a_full_standard_output_is_one_line(command, unbuffered):
    answer = shell(f"sinkbench {command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert answer.stderr == "sinkbench: cannot write to standard output: No space left on device\n"
    assert answer.returncode == 2


def test_a_reader_that_has_gone_is_no_word_and_a_closed_output_none_either():
    gone = shell("sinkbench strategies | true; exit ${PIPESTATUS[0]}")
    assert (gone.returncode, gone.stderr) == (1, "")
    closed = shell("sinkbench strategies >&-")
    assert (closed.returncode, closed.stderr) == (0, "")


def test_characters_that_the_output_cannot_encode_are_escaped(monkeypatch, here):
    os.mkdir("é")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    line = run("--output-dir", "é", "--experiment", "windowed")
    monkeypatch.setattr(sys, "stdout", shown)
    assert here(*line)[0] == 0
    shown.flush()
    assert rb"\xe9/windowed.csv" in shown.buffer.getvalue()
    assert shown.errors == "strict"


def test_an_argument_that_is_not_utf8_is_refused(here):
    refused(here("run", "--experiment", "\udcff"), "not UTF-8")


# Pipes and devices

READ = [
    ["sweep", "pipe.toml"],
    ["sweep", "/dev/zero", "--dry-run"],
    run("--config", "pipe"),
    run("--experiment", "./pipe.py:Mine"),
    run("--dataset-name", "pipe.jsonl"),
    run("--dataset-name", "/dev/zero"),
    run("--model-name-or-path", "pipe"),
    ["compare", "pipe.csv", "pipe"],
    ["report", "out", "--output", "pipe.html"],
    ["plot", "--output-dir", "out", "--output", "pipe.png"],
]


@pytest.mark.parametrize("line", READ, ids=lambda line: " ".join(line[:1] + line[-2:]).replace("/", "_"))
def test_a_pipe_or_a_device_is_refused_and_not_waited_for(line, here):
    if line[0] in ("report", "plot"):
        assert here(*run())[0] == 0
    refused(here(*line), "a pipe, a socket or a device")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_so_is_one_in_the_folder_of_a_model(name, here):
    shutil.copytree(LLAMA, "model")
    with_pipe = f"model/{name}"
    if os.path.exists(with_pipe):
        os.unlink(with_pipe)
    os.mkfifo(with_pipe)
    refused(here(*run("--model-name-or-path", "model")), with_pipe)


def test_so_is_one_where_rows_or_records_are_read_or_written(here, tmp_path):
    assert here(*run())[0] == 0
    shutil.move("pipe", "out/attention_sinks.json")
    refused(here(*run("--resume")), "cannot be read")
    assert here("report", "out")[0] == 0
    assert "a pipe" in (tmp_path / "out" / "report.md").read_text()
    shutil.move("pipe.csv", "out/attention_sinks.csv")
    refused(here(*run("--resume")), "a pipe")
    refused(here(*run("--overwrite")), "a pipe")
    refused(here("plot", "--output-dir", "out"), "a pipe")


# Names


def test_a_name_of_glob_characters_is_that_name_and_no_pattern(here):
    shutil.copytree(LLAMA, "m[1]*")
    shutil.copy(LLAMA / "tokens.jsonl", "t[0-9]*?.jsonl")
    line = run("--model-name-or-path", "m[1]*", "--dataset-name", "t[0-9]*?.jsonl", "--output-dir", "[/o]*")
    assert here(*line)[0] == 0
    assert here(*line, "--experiment", "windowed")[0] == 0
    assert here("compare", "[/o]*")[0] == 0
    assert here("report", "[/o]*")[0] == 0
    plot = ["plot", "--skip-first", "0", "--log-perplexity-limit", "0"]
    assert here(*plot, "--output-dir", "[/o]*", "--output", "[a]*.png")[0] == 0
    assert os.path.exists("[a]*.png")


def test_a_dataset_folder_that_would_be_taken_for_a_pattern_is_refused(here):
    os.mkdir("d*")
    shutil.copy(LLAMA / "tokens.jsonl", "d*")
    refused(here(*run("--dataset-name", "d*")), "rename it")


@pytest.mark.parametrize(
    "line",
    [
        ["run", "--model-name-or-path", ""],
        ["run", "--output-dir", ""],
        ["run", "--config", ""],
        ["speed", "--model-name-or-path", ""],
        ["speed", "--output", ""],
        ["sweep", ""],
        ["report", ""],
        ["report", "out", "--output", ""],
        ["compare", ""],
        ["plot", "--output-dir", ""],
        ["plot", "--output", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_is_refused_and_not_taken_for_the_folder_one_is_in(line, here):
    refused(here(*line), "")
    assert not os.path.exists("report.html")


def test_a_name_that_is_too_long_is_one_line(here):
    for line in (["report", "x" * 5000], ["compare", "x" * 5000, "y"], run("--model-name-or-path", "x" * 5000)):
        refused(here(*line))


# Sizes and devices


@pytest.mark.parametrize(
    "more",
    [
        ["--window-size", str(10**11)],
        ["--num-tokens", str(10**11)],
        ["--chunk-size", str(10**11)],
        ["--num-samples", "9" * 5000],
        ["--attention-sink-size", str(10**11)],
        ["--experiment", "pyramid", "--set", f"beta={10**400}"],
        ["--experiment", "random", "--set", f"seed={10**30}"],
    ],
    ids=lambda more: " ".join(more)[:40],
)
def test_a_size_beyond_all_streams_is_refused(more, here):
    refused(here(*run(*more)))
    assert not os.path.exists("out")


def test_a_window_for_which_there_is_no_memory_is_refused_and_leaves_no_record(here, monkeypatch):
    def starved(*asked):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 128849018880 bytes.")

    monkeypatch.setattr(runs, "choose_engine", lambda *asked, **named: SimpleNamespace(run=starved))
    refused(here(*run()), "not enough memory", "120.0 GiB")
    assert not os.path.exists("out/attention_sinks.json")


@pytest.mark.parametrize("device", ["meta", "meta:0", "disk"])
def test_a_device_that_does_not_compute_is_refused(device, here):
    refused(here(*run("--device-map", device)), "--device-map must be a device that computes")


# What files say

DEEP, LONG = "[" * 100_000, "9" * 10_000


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (f"a = {DEEP}", "nested too deeply"),
        (f"window_size = {LONG}", "too long"),
        ('split = "a\\u0000"', "NUL"),
        ("window_size = 100000000000", "at most 1,000,000,000"),
        ('device_map = "meta"', "computes"),
        ('output_dir = ""', "name of a folder"),
    ],
    ids=["deep", "long", "NUL", "large", "meta", "empty"],
)
def test_toml_that_nests_or_counts_too_far_is_one_line(text, word, here, tmp_path):
    (tmp_path / "e.toml").write_text(text)
    refused(here("sweep", "e.toml", "--dry-run"), "e.toml", word)


DAMAGED = {"deep": DEEP, "closed": "[" * 2000 + "]" * 2000, "long": f'{{"rows": {LONG}}}', "half": r'{"a": "\ud800"}'}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_so_is_json(text, here, tmp_path):
    assert here(*run())[0] == 0
    (tmp_path / "out" / "attention_sinks.json").write_text(text)
    refused(here(*run("--resume")), "cannot be read")
    assert here("report", "out")[0] == 0
    assert "cannot read" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    "change", [{"sessions": 7}, {"sessions": [3, {}]}, {"rows": "x"}, {"seconds": [1]}, {"resumed_at": "x"}], ids=str
)
def test_a_record_edited_to_nonsense_is_not_gone_on_with(change, here, tmp_path):
    assert here(*run())[0] == 0
    path = tmp_path / "out" / "attention_sinks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = path.read_text()
    refused(here(*run("--num-tokens", "9", "--resume")), "is damaged")
    assert path.read_text() == before


@pytest.mark.parametrize("cell", ["[true, false, true]", "[1, 2.5]", f"[1, 2, {2**63}]", "[" * 7000 + "]" * 7000])
def test_tokens_that_are_none_are_refused(cell, here, tmp_path):
    (tmp_path / "t.jsonl").write_text(f'{{"input_ids": {cell}}}\n')
    refused(here(*run("--dataset-name", "t.jsonl")), "t.jsonl")


SLIDING = {"model_type": "gemma3_text", "layer_types": ["sliding_attention"] * 3, "sliding_window": None}


@pytest.mark.parametrize("rows", ["null", ' [null, {"input_ids": [1, 2]}]', "\ufeffnull\n{}"])
def test_a_first_row_that_is_null_is_refused_and_ends_no_process(rows, here, tmp_path):
    (tmp_path / "t.jsonl").write_text(rows)
    refused(here(*run("--dataset-name", "t.jsonl")), "its first row is null")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_theta": -10000.0}, "rope_theta -10000.0"),
        (SLIDING, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "qwen2", "num_hidden_layers": 2**40}, "num_hidden_layers"),
    ],
    ids=["zero", "negative", "without its windows", "an empty window", "no layers", "layers without end"],
)
def test_a_configuration_by_which_nothing_is_predicted_is_refused(change, word, here, tmp_path):
    config = json.loads((LLAMA / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(here(*run("--model-name-or-path", "config.json", "--random-weights")), word)


@pytest.mark.parametrize("value", ["1e308", "-1e308", "0", "-1"])
@pytest.mark.parametrize("column", ["nll", "overall_ppl", "input_length"])
def test_a_number_that_no_run_measured_is_damage_with_its_line_and_prints_no_warning(column, value, here, tmp_path):
    assert here(*run())[0] == 0
    csv = tmp_path / "out" / "attention_sinks.csv"
    header, *rows = csv.read_text().splitlines()
    cells = rows[2].split(",")
    cells[header.split(",").index(column)] = value
    rows[2] = ",".join(cells)
    csv.write_text("\n".join([header, *rows]) + "\n")
    plot = ["plot", "--output-dir", "out", "--skip-first", "0", "--log-perplexity-limit", "0"]
    status, _, error = here(*plot)
    impossible = abs(float(value)) > 1 if column != "overall_ppl" else float(value) <= 0
    if impossible:
        refused((status, "", error), "line 4", f"as its {column}, which no run measured")
    assert "Warning" not in error
    refused(here(*run("--resume")), "line 4")
