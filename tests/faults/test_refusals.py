"""What is refused before the first row leaves everything as it was: no file, and no folder."""

import json
from multiprocessing import get_context
from pathlib import Path

import pytest
from golden import GOLDEN, golden_options

from sinkbench.runs.writer import RowWriter

LLAMA = GOLDEN / "llama"


def everything(folder):
    """All that is in a folder, hidden or not: by name, the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def other(folder, **changes):
    """A copy of the golden model with another configuration."""
    folder.mkdir()
    for path in LLAMA.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    return folder


def dataset(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n")
    return path


RUNS = {
    "no such model": lambda tmp: ["--model-name-or-path", tmp / "nowhere"],
    "weights missing": lambda tmp: ["--model-name-or-path", other(tmp / "model", num_hidden_layers=9)],
    "a configuration that is none": lambda tmp: ["--model-name-or-path", other(tmp / "model", hidden_size="wide")],
    "no such dataset": lambda tmp: ["--dataset-name", tmp / "nowhere.jsonl"],
    "an empty dataset": lambda tmp: ["--dataset-name", dataset(tmp, '{"input_ids": []}')],
    "a token that the model has not": lambda tmp: ["--dataset-name", dataset(tmp, '{"input_ids": [1, 2, 999999]}')],
    "no such column": lambda tmp: ["--data-column", "nothing"],
    "text without a tokenizer": lambda tmp: ["--dataset-name", dataset(tmp, '{"input_ids": "a text"}')],
    "an unknown strategy": lambda tmp: ["--experiment", "magic"],
    "a window of sinks alone": lambda tmp: ["--window-size", 4],
    "a format that the heads cannot take": lambda tmp: ["--kv-format", "q4_0:block=7"],
    "an engine that the strategy cannot take": lambda tmp: ["--engine", "parallel", "--kv-format", "kivi2"],
    "nothing to go on with": lambda tmp: ["--resume", "--model-name-or-path", tmp / "nowhere"],
    "a device that is not there": lambda tmp: ["--device-map", "cuda:7"],
    "a folder whose name is too long": lambda tmp: ["--output-dir", tmp / "a" / ("x" * 3000)],
    "a file where a folder should be": lambda tmp: ["--output-dir", dataset(tmp, "{}") / "below"],
}


@pytest.mark.parametrize("refusal", RUNS)
def test_a_run_that_is_refused_leaves_nothing_behind(refusal, here, tmp_path):
    more = RUNS[refusal](tmp_path)
    before = everything(tmp_path)
    into = [] if "--output-dir" in more else ["--output-dir", tmp_path / "a" / "b"]
    status, _, error = here("run", *golden_options("llama"), "--num-tokens", 20, *more, *into)
    assert (status, len(error.splitlines())) == (2, 1), error
    assert everything(tmp_path) == before


@pytest.mark.parametrize("refusal", [name for name in RUNS if "folder" not in name and name != "nothing to go on with"])
def test_nor_does_it_change_a_result_that_it_was_to_replace(refusal, here, tmp_path):
    out = tmp_path / "a"
    assert here("run", *golden_options("llama"), "--num-tokens", 20, "--output-dir", out)[0] == 0
    more = RUNS[refusal](tmp_path)
    before = everything(tmp_path)
    line = ["run", *golden_options("llama"), "--num-tokens", 30, "--output-dir", out, *more]
    for how in ("--overwrite", "--resume"):
        status, _, error = here(*line, how)
        assert (status, len(error.splitlines())) == (2, 1), error
        assert everything(tmp_path) == before


COMMANDS = {
    "generate": [
        ["--model-name-or-path", "{tmp}/nowhere"],
        ["--model-name-or-path", LLAMA],  # without a tokenizer
        ["--model-name-or-path", LLAMA, "--window-size", 2],
    ],
    "report": [
        ["{tmp}", "--output", "{tmp}/new/report.html"],
        ["{tmp}/nowhere"],
        ["{tmp}", "--output", "{tmp}/n/r.pdf"],
    ],
    "plot": [["--output-dir", "{tmp}", "--output", "{tmp}/new/figure.png"], ["--output-dir", "{tmp}/nowhere"]],
    "compare": [["{tmp}"], ["{tmp}", "--by", "recall-distance"], ["{tmp}", "--key-tokens", "a", "b"]],
    "speed": [
        ["--model-name-or-path", "{tmp}/nowhere", "--output", "{tmp}/new/speed.md"],
        ["--model-name-or-path", LLAMA, "--output", "{tmp}/new/speed.txt"],
    ],
    "sweep": [["{tmp}/nowhere.toml"], ["{tmp}/wrong.toml"], ["{tmp}/wrong.toml", "--dry-run"]],
}


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, lines in COMMANDS.items() for line in lines])
def test_nor_do_other_commands(command, line, here, tmp_path):
    (tmp_path / "wrong.toml").write_text(f'output_dir = "{tmp_path}/out"\nwindow_size = "wide"\n')
    before = everything(tmp_path)
    into = ["--output-dir", tmp_path / "a" / "b"] if command == "generate" else []
    status, _, error = here(command, *(str(word).format(tmp=tmp_path) for word in line), *into)
    assert (status, len(error.splitlines())) == (2, 1), error
    assert everything(tmp_path) == before


def test_folders_that_were_there_stay(tmp_path):
    (tmp_path / "a").mkdir()
    with RowWriter(tmp_path / "a" / "b" / "c" / "x.csv"):
        assert (tmp_path / "a" / "b" / "c").is_dir()
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]


def opened(folder: Path, number: int) -> None:
    for _ in range(100):
        with RowWriter(folder / f"{number}.csv"):
            pass


def test_processes_that_make_and_remove_one_folder_do_not_disturb_each_other(tmp_path):
    at_once = get_context("fork").Process
    workers = [at_once(target=opened, args=(tmp_path / "a" / "b", number)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
