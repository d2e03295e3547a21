"""Files are replaced, whole or not at all; what becomes of them meanwhile is noticed."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from answers import refused
from golden import GOLDEN, golden_options
from processes import begun, ended
from resuming import run

from sinkbench.engines.step import Steps
from sinkbench.errors import UserError
from sinkbench.results.files import replace_file
from sinkbench.runs import run as runs
from sinkbench.runs.record import write_json

FIGURE = ("--features", "perplexity", "--skip-first", "0", "--log-perplexity-limit", "0")
WRITTEN = {
    "report.html": ("report", "{out}", "--output", "{file}"),
    "report.md": ("report", "{out}", "--output", "{file}"),
    "figure.png": ("plot", "--output-dir", "{out}", *FIGURE, "--output", "{file}"),
    "figure.svg": ("plot", "--output-dir", "{out}", *FIGURE, "--output", "{file}"),
    "figure.pdf": ("plot", "--output-dir", "{out}", *FIGURE, "--output", "{file}"),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the result of a run."""
    from sinkbench.cli import main

    out = tmp_path_factory.mktemp("measured")
    main(run(out, "--num-tokens", 40))
    return out


@pytest.fixture
def out(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "out")


def line(name, out, file):
    return [part.format(out=out, file=file) for part in WRITTEN[name]]


@pytest.mark.parametrize("name", WRITTEN)
def test_a_limit_on_the_size_of_files_leaves_the_older_one(name, out, tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    (tmp_path / "there").mkdir()
    file = tmp_path / "there" / name
    file.write_text("older")
    status = ended(begun(line(name, out, file), tmp_path / "shown", limited))
    refused((status, "", (tmp_path / "shown").read_text()), "File too large", "give another --output")
    assert file.read_text() == "older"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("name", WRITTEN)
def test_half_a_character_is_spelled_out(name, here, out, tmp_path):
    record = json.loads((out / "attention_sinks.json").read_text())
    (out / "attention_sinks.json").write_text(json.dumps(record | {"experiment": "\ud800", "command": ["\udcff"]}))
    file = tmp_path / name
    file.write_text("older")
    assert here(*line(name, out, file))[0] == 0
    assert file.read_bytes() != b"older"


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_in_the_way_of_a_part_is_one_line(name, kind, here, out, tmp_path):
    file, part = tmp_path / name, tmp_path / f".{name}.part"
    file.write_text("older")
    if kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(out / "attention_sinks.csv")
    rows = (out / "attention_sinks.csv").read_bytes()
    refused(here(*line(name, out, file)), "cannot write")
    assert file.read_text() == "older"
    assert (out / "attention_sinks.csv").read_bytes() == rows


@pytest.mark.parametrize("name", ["attention_sinks.csv", "attention_sinks.json", ".attention_sinks.json.part"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",)])
def test_a_folder_where_a_file_of_a_run_should_be_is_one_line(name, more, here, tmp_path):
    (tmp_path / "out" / name).mkdir(parents=True)
    refused(here(*run(tmp_path / "out", "--num-tokens", 40, *more)), "cannot write")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_a_folder_where_its_record_should_be_leaves_an_older_result(here, out):
    (out / "attention_sinks.json").unlink()
    (out / "attention_sinks.json").mkdir()
    rows = (out / "attention_sinks.csv").read_bytes()
    refused(here(*run(out, "--num-tokens", 40, "--overwrite")), "cannot write")
    assert (out / "attention_sinks.csv").read_bytes() == rows


def test_a_part_that_was_left_behind_is_taken_over(tmp_path):
    (tmp_path / ".a.json.part").write_text("x" * 10_000)
    write_json(tmp_path / "a.json", {"a": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.json").symlink_to("there/real.json")
    write_json(tmp_path / "link.json", {})
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there" / "real.json").read_text() == "{}\n"


def test_a_failure_before_the_name_is_given_leaves_nothing(tmp_path):
    def failing():
        raise RuntimeError

    (tmp_path / "a").write_text("older")
    with pytest.raises(RuntimeError):
        replace_file(tmp_path / "a", b"newer", ready=failing)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "older")]


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_a_name_that_no_file_can_have_is_one_line(name, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        replace_file(tmp_path / name, b"")


def removed(csv: Path) -> None:
    csv.unlink()


def emptied(csv: Path) -> None:
    csv.write_bytes(b"")


def cut(csv: Path) -> None:
    os.truncate(csv, csv.stat().st_size - 5)


def replaced(csv: Path) -> None:
    shutil.copy(csv, csv.with_suffix(".copy"))
    csv.with_suffix(".copy").rename(csv)


def written_to(csv: Path) -> None:
    with csv.open("a") as file:
        file.write("1,2,3\n")


def folder_removed(csv: Path) -> None:
    shutil.rmtree(csv.parent)


DISTURBED = [removed, emptied, cut, replaced, written_to, folder_removed]


def disturbing(monkeypatch, csv, disturb, steps=30):
    """Runs in which ``csv`` is disturbed after some rows."""

    def carry_out(plan, tokens, start, trace):
        for t in range(start, steps):
            if t == start + 9:
                disturb(csv)
            yield Steps(t + 1, [1.0], 0.1, None, [0])

    monkeypatch.setattr(runs, "choose_engine", lambda *asked, **named: SimpleNamespace(run=carry_out))


@pytest.mark.parametrize("disturb", DISTURBED)
def test_rows_that_are_disturbed_while_they_are_written_are_not_finished(disturb, here, tmp_path, monkeypatch):
    csv = tmp_path / "out" / "attention_sinks.csv"
    disturbing(monkeypatch, csv, disturb)
    refused(here(*run(csv.parent, "--num-tokens", 30)), "removed, replaced or changed", "--overwrite", str(csv))
    if disturb is not folder_removed:
        assert json.loads(csv.with_suffix(".json").read_text())["exit_reason"].startswith("failed: ")


def test_a_sweep_does_not_take_such_a_cell_for_finished(here, tmp_path, monkeypatch):
    file, csv = tmp_path / "a.toml", tmp_path / "out" / "attention_sinks.csv"
    llama = GOLDEN / "llama"
    file.write_text(
        f'model_name_or_path = "{llama}"\ndataset_name = "{llama / "tokens.jsonl"}"\ndata_column = "input_ids"\n'
        f'num_tokens = 30\noutput_dir = "{csv.parent}"\n'
    )
    disturbing(monkeypatch, csv, removed)
    status, _, error = here("sweep", file, "--retries", 0)
    assert (status, "failed: " in error) == (1, True)
    monkeypatch.undo()
    assert here("sweep", file)[0] == 0
    assert len(pd.read_csv(csv)) == 30


def test_a_resumed_run_is_watched_too(here, tmp_path, monkeypatch):
    csv = tmp_path / "attention_sinks.csv"
    options = [*golden_options("llama"), "--output-dir", tmp_path]
    assert here("run", *options, "--num-tokens", 20)[0] == 0
    disturbing(monkeypatch, csv, cut, 40)
    refused(here("run", *options, "--num-tokens", 40, "--resume"), "removed, replaced or changed")
