"""Sweeps: every combination of a file, each result once, whatever happens in between."""

import json
import os
import pty
import re
import shutil
import signal
import threading
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from golden import GOLDEN, golden_options
from processes import await_rows, begun, ended, stream_of

from sinkbench.models import loading
from sinkbench.runs import run as runs
from sinkbench.sweeps import plan as sweeps
from sinkbench.sweeps.launchers import local

LLAMA = GOLDEN / "llama"
NAMES = ("transformers", *(f"{name}-window_{size}" for name in ("windowed", "attention_sinks") for size in (16, 32)))


@pytest.fixture
def file(tmp_path):
    """Writes an experiment file over the tiny model; keyword arguments replace options."""

    def write(name="tiny.toml", **changes):
        options = {
            "model_name_or_path": str(LLAMA),
            "dataset_name": str(LLAMA / "tokens.jsonl"),
            "data_column": "input_ids",
            "experiment": ["transformers", "windowed", "attention_sinks"],
            "window_size": [16, 32],
            "dtype": "float32",
            "num_tokens": 48,
            "output_dir": str(tmp_path / "out"),
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in {**options, **changes}.items()]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    return write


@pytest.fixture
def loads(monkeypatch):
    """The models that the local launcher loads, as it loads them."""
    loaded, load = [], local.load_model
    monkeypatch.setattr(local, "load_model", lambda found: loaded.append(found.source.name) or load(found))
    return loaded


def with_engines(monkeypatch, run):
    """Runs go through ``run``, which is given the engine that was chosen."""
    choose = runs.choose_engine
    monkeypatch.setattr(
        runs, "choose_engine", lambda *asked, **named: SimpleNamespace(run=partial(run, choose(*asked, **named)))
    )


def out_of(file):
    return file.parent / "out"


def stems(folder, suffix):
    return {path.stem for path in folder.glob(f"*{suffix}")}


def record(csv):
    return json.loads(csv.with_suffix(".json").read_text())


def test_every_cell_has_the_result_of_a_run_of_its_own(here, file, tmp_path):
    path = file()
    status, out, error = here("sweep", path)
    assert status == 0
    assert stems(out_of(path), ".csv") == stems(out_of(path), ".json") == set(NAMES)
    assert [line.split(": ")[1] for line in error.splitlines()] == ["finished"] * 5
    assert "attention_sinks-window_16" in out
    alone = golden_options("llama")
    here("run", *alone, "--num-tokens", "48", "--output-dir", tmp_path / "alone")
    swept = pd.read_csv(out_of(path) / "attention_sinks-window_32.csv")
    wanted = pd.read_csv(tmp_path / "alone" / "attention_sinks.csv")
    assert list(swept.nll) == list(wanted.nll)
    assert (
        record(out_of(path) / "attention_sinks-window_32.csv")["key"]
        == (record(tmp_path / "alone" / "attention_sinks.csv")["key"])
    )


def test_a_model_is_loaded_once_for_all_its_cells(here, file, loads):
    here("sweep", file(dtype=["float32", "bfloat16"], window_size=[16]))
    assert loads == [str(LLAMA)] * 2


def test_a_text_is_read_once_for_all_its_cells(here, file, monkeypatch):
    read, reads = local.read_text, []
    monkeypatch.setattr(local, "read_text", lambda *asked: reads.append(asked[0].num_tokens) or read(*asked))
    shutil.copy(LLAMA / "tokens.jsonl", file().parent / "other.jsonl")
    tables = [(LLAMA / "tokens.jsonl", 60), (file().parent / "other.jsonl", 120)]
    texts = ", ".join(f'{{ name = "{name}", num_tokens = {count} }}' for name, count in tables)
    path = file()
    path.write_text(re.sub("dataset_name = .*", f"dataset_name = [{texts}]", path.read_text()))
    assert here("sweep", path)[0] == 0
    assert reads == [60, 120]


def test_a_dry_run_shows_every_cell_with_its_cost_and_writes_nothing(here, file, loads):
    path = file()
    status, out, _ = here("sweep", path, "--dry-run")
    assert status == 0
    assert "5 runs" in out
    assert out.count("GiB") == 5
    assert not out_of(path).exists()
    assert not loads


def test_what_is_finished_is_skipped_whatever_its_files_are_called(here, file, loads):
    path = file()
    here("sweep", path)
    for suffix in (".csv", ".json"):
        (out_of(path) / f"transformers{suffix}").rename(out_of(path) / f"dense{suffix}")
    before = {p.name: p.stat().st_mtime_ns for p in out_of(path).iterdir()}
    loads.clear()
    status, out, _ = here("sweep", path)
    assert status == 0
    assert out.count("was there") == 5
    assert before == {p.name: p.stat().st_mtime_ns for p in out_of(path).iterdir()}
    assert not loads


def test_a_result_is_not_mistaken_for_that_of_other_options(here, file):
    here("sweep", file())
    status, out, _ = here("sweep", file(num_tokens=130, window_size=[16]))
    assert status == 0
    assert "was there" not in out


def test_a_finished_cell_that_has_lost_rows_is_completed(here, file):
    path = file()
    here("sweep", path)
    csv = out_of(path) / "windowed-window_16.csv"
    whole = pd.read_csv(csv)
    csv.write_text("".join(csv.read_text().splitlines(keepends=True)[:21]) + "21,1.")
    status, out, _ = here("sweep", path)
    assert (status, out.count("was there")) == (0, 4)
    again = pd.read_csv(csv)
    assert list(again.input_length) == list(range(1, 49))
    assert again.nll.to_numpy() == pytest.approx(whole.nll.to_numpy(), abs=2e-4)
    assert record(csv)["resumed_at"] == [20]


def test_overwrite_runs_what_is_finished_again(here, file, loads):
    here("sweep", file())
    loads.clear()
    _, out, _ = here("sweep", file(), "--overwrite")
    assert "was there" not in out
    assert len(loads) == 1


def test_out_of_memory_is_a_result_and_the_sweep_goes_on(here, file, monkeypatch):
    def starved(engine, plan, tokens, start, trace):
        for step in engine.run(plan, tokens, start, trace):
            if plan.dense and step.first > 10:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield step

    with_engines(monkeypatch, starved)
    path = file()
    status, out, _ = here("sweep", path)
    assert status == 0
    assert "ran out of memory" in " ".join(out.replace("│", " ").split())
    assert len(pd.read_csv(out_of(path) / "transformers.csv")) == 10
    assert record(out_of(path) / "windowed-window_32.csv")["exit_reason"] == "finished"
    assert here("sweep", path)[1].count("was there") == 5


@pytest.mark.parametrize(("retries", "ends"), [(0, "failed: RuntimeError: cable pulled"), (2, "finished")])
def test_a_cell_that_fails_is_tried_again_as_often_as_stated(retries, ends, here, file, monkeypatch):
    tries = []

    def loose(engine, plan, tokens, start, trace):
        if (plan.window, plan.governed[0].policy.sinks) == (16, 0):
            tries.append(start)
            if len(tries) <= 2:
                yield from (step for step in engine.run(plan, tokens, start, trace) if step.first <= start + 5)
                raise RuntimeError("cable pulled")
        yield from engine.run(plan, tokens, start, trace)

    with_engines(monkeypatch, loose)
    path = file()
    status, _, _ = here("sweep", path, "--retries", str(retries))
    assert status == (1 if retries == 0 else 0)
    assert record(out_of(path) / "windowed-window_16.csv")["exit_reason"] == ends
    assert stems(out_of(path), ".csv") == set(NAMES)
    assert tries == [0, 5, 10][: retries + 1]  # each try goes on where the last one stopped


def test_a_cell_that_cannot_run_is_on_record_and_the_others_run(here, file, tmp_path):
    path = file(model_name_or_path=[str(tmp_path / "nowhere"), str(LLAMA)], window_size=[16])
    assert here("sweep", path, "--retries", "0")[0] == 1
    failed = record(out_of(path) / "nowhere" / "windowed.csv")
    assert failed["exit_reason"].startswith("failed: no model folder")
    assert record(out_of(path) / "llama" / "windowed.csv")["exit_reason"] == "finished"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_interrupted_goes_on_where_it_was(number, status, here, file, tmp_path):
    tokens = stream_of(tmp_path / "long.jsonl", 601)
    path = file(dataset_name=str(tokens), num_tokens=600, window_size=[16], experiment=["transformers", "windowed"])
    csv, child = out_of(path) / "transformers.csv", begun(["sweep", path])
    await_rows(csv, child, 2000)
    os.kill(child, number)
    assert ended(child) == status
    cut = len(pd.read_csv(csv))
    assert cut < 600
    status, _, error = here("sweep", path)
    assert status == 0, error
    assert list(pd.read_csv(csv).input_length) == list(range(1, 601))
    found = record(csv)
    assert found["resumed_at"] == [cut]
    first, second = found["sessions"]
    assert first["exit_reason"] == f"interrupted ({signal.Signals(number).name})"
    assert [(s["first_row"], s["rows"]) for s in (first, second)] == [(1, cut), (cut + 1, 600 - cut)]
    assert first["seconds"] + second["seconds"] == pytest.approx(found["seconds"])


def test_on_a_terminal_the_table_is_live(file):
    parent, child = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "100"}
    process = begun(["sweep", file()], os.ttyname(child), lambda: os.environ.update(environment))
    shown = []

    def read():
        with suppress(OSError):  # what a terminal says whose other end is closed
            shown.extend(iter(partial(os.read, parent, 65536), b""))

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    assert ended(process) == 0
    os.close(child)
    reading.join(5)
    text = b"".join(shown).decode()
    assert "waiting" in text
    assert "running" in text
    assert text.rstrip().splitlines()[-2].count("finished") == 1


def elsewhere(csv, **changes):
    """Make the result one of another machine's."""
    about = record(csv)
    about["sessions"][-1]["device"] = "another machine"
    csv.with_suffix(".json").write_text(json.dumps(about | {"device": "another machine"} | changes))


def test_a_result_of_another_device_does_not_stand_for_this_ones_and_is_not_replaced_unasked(here, file, tmp_path):
    path = file(window_size=[16])
    here("sweep", path)
    csv = out_of(path) / "windowed.csv"
    elsewhere(csv)
    before = csv.read_bytes(), record(csv)
    status, _, error = here("sweep", path)
    assert (status, len(error.splitlines())) == (2, 1)
    assert f"{csv} was measured on another machine" in error
    assert "--overwrite" in error
    assert (csv.read_bytes(), record(csv)) == before
    status, out, _ = here("sweep", path, "--output-dir", tmp_path / "mine")
    assert (status, out.count("was there")) == (0, 0)
    assert here("sweep", path, "--overwrite")[0] == 0
    assert record(csv)["device"] != "another machine"
    assert here("sweep", path)[1].count("was there") == 3


def test_out_of_memory_elsewhere_goes_on_here(here, file):
    path = file(window_size=[16])
    here("sweep", path)
    csv = out_of(path) / "windowed.csv"
    csv.write_text("".join(csv.read_text().splitlines(keepends=True)[:21]))
    elsewhere(csv, exit_reason="out of memory", rows=20)
    status, out, error = here("sweep", path)
    assert (status, out.count("was there")) == (0, 2), error
    first, second = record(csv)["sessions"]
    assert (first["device"], first["rows"], second["rows"]) == ("another machine", 20, 28)
    assert second["device"] == record(csv)["device"] != "another machine"
    assert here("sweep", path)[1].count("was there") == 3


def test_a_model_is_looked_for_once_for_all_its_cells(here, file, monkeypatch):
    looked, locate = [], loading._arguments
    monkeypatch.setattr(loading, "_arguments", lambda source: looked.append(source.dtype) or locate(source))
    assert here("sweep", file(dtype=["float32", "bfloat16"], window_size=[16]))[0] == 0
    assert looked == ["float32", "bfloat16"]


def test_what_an_engine_notes_is_said_once_and_is_on_record(here, file, monkeypatch):
    choose = runs.choose_engine

    def noting(model, plan, engine, graphs, chunk, note, *asked, **named):
        note("taking the plain way")
        return choose(model, plan, engine, graphs, chunk, note, *asked, **named)

    monkeypatch.setattr(runs, "choose_engine", noting)
    path = file(experiment="windowed", window_size=16)
    _, _, error = here("sweep", path)
    assert error.splitlines() == ["windowed: taking the plain way", "windowed: finished"]
    assert record(out_of(path) / "windowed.csv")["notes"] == ["taking the plain way"]


def test_only_whole_results_count_as_finished(here, file):
    path = file()
    here("sweep", path)
    assert len(sweeps.finished_in(out_of(path))) == 5
    (out_of(path) / "transformers.csv").write_text("input_length\n")
    (out_of(path) / "windowed-window_16.json").write_text("{")
    (out_of(path) / "windowed-window_32.json").write_text(json.dumps({"exit_reason": "running", "key": "k"}))
    assert len(sweeps.finished_in(out_of(path))) == 2
