"""Whatever ends a run, completed rows stay, readable, and the reason is on record."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from answers import refused
from golden import GOLDEN, golden_options
from processes import await_rows, begun, ended, kill, running, size, stream_of

from sinkbench.config import RunConfig
from sinkbench.engines.step import Steps
from sinkbench.errors import UserError
from sinkbench.runs import run as runs
from sinkbench.runs.writer import RowWriter

ROWS = 2000  # bytes: some twenty rows


@pytest.fixture
def long_stream(tmp_path):
    return stream_of(tmp_path / "long.jsonl", 20_001)


def endless(long_stream, out, *more):
    """A run that is not about to end."""
    return [
        "run",
        *golden_options("llama"),
        "--dataset-name",
        long_stream,
        "--num-tokens",
        20_000,
        "--output-dir",
        out,
        *more,
    ]


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_leaves_every_completed_row(number, status, long_stream, tmp_path):
    csv = tmp_path / "out" / "attention_sinks.csv"
    child = begun(endless(long_stream, csv.parent))
    await_rows(csv, child, ROWS)
    os.kill(child, number)
    assert ended(child) == status
    frame = pd.read_csv(csv)
    assert list(frame.input_length) == list(range(1, len(frame) + 1))
    assert frame.drop(columns="cuda_vram_allocated").notna().all().all()
    record = json.loads(csv.with_suffix(".json").read_text())
    if number == signal.SIGKILL:
        assert record["exit_reason"] == "running"
    else:
        assert record["exit_reason"] == f"interrupted ({number.name})"
        assert record["rows"] == len(frame)


@pytest.mark.heavy
def test_so_it_does_to_the_installed_command(long_stream, tmp_path):
    csv = tmp_path / "out" / "attention_sinks.csv"
    command = [sys.executable, "-m", "sinkbench", *map(str, endless(long_stream, csv.parent))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    await_rows(csv, process.pid, ROWS)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in error) == (143, False)
    rows = len(pd.read_csv(csv))
    assert f"{rows:,}" in out
    assert json.loads(csv.with_suffix(".json").read_text())["rows"] == rows


def test_a_second_process_is_kept_off_a_file_that_is_being_written(long_stream, tmp_path, here):
    csv = tmp_path / "out" / "attention_sinks.csv"
    child = begun(endless(long_stream, csv.parent))
    try:
        await_rows(csv, child, ROWS)
        status, _, error = here("run", *golden_options("llama"), "--overwrite", "--output-dir", csv.parent)
        assert (status, "another process is writing" in error) == (2, True)
        assert running(child)
    finally:
        kill(child)


def test_out_of_memory_is_a_result(monkeypatch, here, tmp_path):
    def starved(plan, tokens, start, trace):
        for t in range(7):
            yield Steps(t + 1, [1.0], 0.1, None, [0])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "choose_engine", lambda *asked, **named: SimpleNamespace(run=starved))
    status, out, _ = here("run", *golden_options("llama"), "--output-dir", tmp_path)
    assert status == 0
    assert "ran out of memory after 7 tokens" in out
    assert len(pd.read_csv(tmp_path / "attention_sinks.csv")) == 7
    assert json.loads((tmp_path / "attention_sinks.json").read_text())["exit_reason"] == "out of memory"


def test_a_failure_in_the_middle_keeps_the_rows_and_records_itself(monkeypatch, tmp_path):
    def failing(plan, tokens, start, trace):
        yield Steps(1, [1.0], 0.1, None, [0])
        raise RuntimeError("cable pulled")

    monkeypatch.setattr(runs, "choose_engine", lambda *asked, **named: SimpleNamespace(run=failing))

    folder = GOLDEN / "llama"
    options = RunConfig(
        model_name_or_path=str(folder),
        dataset_name=str(folder / "tokens.jsonl"),
        data_column="input_ids",
        output_dir=tmp_path,
    )
    with pytest.raises(RuntimeError):
        runs.run(options)
    assert len(pd.read_csv(tmp_path / "attention_sinks.csv")) == 1
    assert "cable pulled" in json.loads((tmp_path / "attention_sinks.json").read_text())["exit_reason"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB."""
    where = tmp_path / "small"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", where], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(engine, small_disk, long_stream, here):
    tokens = ["--dataset-name", long_stream, "--num-tokens", "2000", "--engine", engine, "--chunk-size", "128"]
    line = ["run", *golden_options("llama"), *tokens, "--output-dir", small_disk]
    csv = small_disk / "attention_sinks.csv"
    refused(here(*line), "No space left on device", "--resume", str(csv))
    text = csv.read_text()
    assert text.endswith("\n")
    rows = len(pd.read_csv(csv))
    assert 100 < rows < 2000
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert here(*line, "--resume")[0] == 0
    frame = pd.read_csv(csv)
    assert list(frame.input_length) == list(range(1, 2001))
    assert csv.read_text().startswith(text)
    record = json.loads(csv.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"], record["resumed_at"]) == ("finished", 2000, [rows])


def test_a_quota_that_is_used_up_is_told_too(long_stream, tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    line = ["run", *golden_options("llama"), "--dataset-name", long_stream, "--num-tokens", "2000"]
    status = ended(begun([*line, "--output-dir", tmp_path / "out"], tmp_path / "shown", limited))
    refused((status, "", (tmp_path / "shown").read_text()), "File too large", "--resume")
    assert (tmp_path / "out" / "attention_sinks.csv").read_text().endswith("\n")


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(tmp_path, here, monkeypatch):
    monkeypatch.setattr(runs, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(runs, "read_streams", lambda *_: pytest.fail("a text was read"))
    where = tmp_path / "read-only"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", where], capture_output=True, check=False)
    where.chmod(0o555) if mounted.returncode else None  # enough to keep out who is not root
    try:
        if os.access(where, os.W_OK):
            pytest.skip("everything can be written here")
        refused(here("run", *golden_options("llama"), "--output-dir", where), "cannot write", str(where))
        refused(here("run", *golden_options("llama"), "--output-dir", where / "below"), "cannot write")
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", where], check=True)


def test_a_file_where_the_folder_should_be_is_told(tmp_path, here):
    (tmp_path / "out").write_text("")
    refused(here("run", *golden_options("llama"), "--output-dir", tmp_path / "out"), "cannot write")


def test_of_two_that_resume_one_is_kept_off(long_stream, tmp_path, here):
    csv = tmp_path / "out" / "attention_sinks.csv"
    child = begun(endless(long_stream, csv.parent))
    await_rows(csv, child, ROWS)
    kill(child)
    line = endless(long_stream, csv.parent, "--resume")
    held = size(csv)
    first = begun(line)
    try:
        await_rows(csv, first, held + ROWS)
        status, _, error = here(*line)
        assert (status, "another process is writing" in error) == (2, True)
        assert running(first)
    finally:
        kill(first)
    assert size(csv) > held
    rows = csv.read_text().split("\n")[1:-1]
    assert [int(row.split(",")[0]) for row in rows] == list(range(1, len(rows) + 1))


def test_a_clock_that_goes_backwards_changes_no_latency_and_is_noticed_in_the_report(tmp_path, here, monkeypatch):
    real, begin = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * (time.monotonic() - begin))
    status, _, error = here("run", *golden_options("llama"), "--output-dir", tmp_path)
    monkeypatch.undo()
    assert status == 0, error
    record = json.loads((tmp_path / "attention_sinks.json").read_text())
    assert record["ended"] < record["started"]
    assert record["seconds"] > 0
    assert (pd.read_csv(tmp_path / "attention_sinks.csv").latency > 0).all()
    assert here("report", tmp_path)[0] == 0
    assert "it ended at" in (tmp_path / "report.md").read_text()


def test_a_csv_that_was_cut_is_drawn_and_reported_without_its_last_row(tmp_path, here):
    assert here("run", *golden_options("llama"), "--output-dir", tmp_path)[0] == 0
    csv = tmp_path / "attention_sinks.csv"
    csv.write_bytes(csv.read_bytes()[:-9])
    assert here("plot", "--output-dir", tmp_path, "--log-perplexity-limit", "0")[0] == 0
    assert here("report", tmp_path)[0] == 0
    assert "299" in (tmp_path / "report.md").read_text()


def test_a_disk_too_full_for_a_new_result_leaves_the_old_one(small_disk, here):
    line = ["run", *golden_options("llama"), "--num-tokens", "50", "--output-dir", small_disk]
    assert here(*line)[0] == 0
    names = ["attention_sinks.csv", "attention_sinks.json"]
    before = [(small_disk / name).read_bytes() for name in names]
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2**17))
    refused(here(*line, "--overwrite"), "cannot write", "No space left on device")
    assert [(small_disk / name).read_bytes() for name in names] == before
    assert sorted(p.name for p in small_disk.iterdir()) == [*names, "filler"]


def test_a_disk_too_full_for_the_first_rows_is_left_as_it_was(small_disk, long_stream, here):
    tokens = ["--dataset-name", long_stream, "--num-tokens", "2000", "--engine", "parallel", "--chunk-size", "2000"]
    line = ["run", *golden_options("llama"), *tokens, "--output-dir", small_disk]
    refused(here(*line), "No space left on device")
    assert list(small_disk.iterdir()) == []


def contend(path, me, rounds, chance):
    """Take the file again and again, now with a row and now without, which removes it; how often a row was lost."""
    lost = written = 0
    while written < rounds:
        try:
            writer = RowWriter(path, overwrite=True)
        except UserError:
            continue
        with writer:
            if chance.random() < 0.5:
                writer.begin()
                writer.write(Steps(1, [1.0], None, None, [0]), [me])
                lost += not path.exists() or not path.read_text().endswith(f",{me}\n")
                writer.rows = 0  # so that closing it removes it again
                written += 1
    return lost


def test_processes_that_open_and_remove_one_file_never_write_to_a_removed_one(tmp_path, seed):
    children = []
    for me in range(4):
        child = os.fork()
        if not child:
            status = 1
            try:
                status = int(contend(tmp_path / "a.csv", me, 500, random.Random(seed + me)) > 0)
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
