"""Whatever ends a run, completed rows stay, readable, and the reason is on record."""

import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import GOLDEN, golden_options

from sinkbench import runs
from sinkbench.engines.step import Steps


@pytest.fixture
def long_stream(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"input_ids": [i * 7 % 500 for i in range(100_000)]}) + "\n")
    return path


def start(long_stream, out):
    options = [*golden_options("llama"), "--dataset-name", str(long_stream), "--num-tokens", "90000"]
    command = [sys.executable, "-m", "sinkbench", "run", *options, "--output-dir", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})


def wait_for_rows(csv, process, count=20):
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if csv.exists() and csv.read_text().count("\n") > count:
            return
        time.sleep(0.05)
    raise AssertionError("no rows were written")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_leaves_every_completed_row(number, status, long_stream, tmp_path):
    csv = tmp_path / "out" / "attention_sinks.csv"
    process = start(long_stream, csv.parent)
    wait_for_rows(csv, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    frame = pd.read_csv(csv)
    assert list(frame.input_length) == list(range(1, len(frame) + 1))
    assert frame.drop(columns="cuda_vram_allocated").notna().all().all()
    record = json.loads(csv.with_suffix(".json").read_text())
    if number == signal.SIGKILL:
        assert record["exit_reason"] == "running"
    else:
        assert record["exit_reason"] == f"interrupted ({number.name})"
        assert record["rows"] == len(frame)


def test_a_second_process_is_kept_off_a_file_that_is_being_written(long_stream, tmp_path, here):
    csv = tmp_path / "out" / "attention_sinks.csv"
    process = start(long_stream, csv.parent)
    try:
        wait_for_rows(csv, process)
        status, _, error = here("run", *golden_options("llama"), "--overwrite", "--output-dir", csv.parent)
        assert status == 2
        assert "another process is writing" in error
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_out_of_memory_is_a_result(monkeypatch, here, tmp_path):
    def starved(model, keep, tokens):
        for t in range(7):
            yield Steps(t + 1, [1.0], 0.1, None, [0])
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "stepwise", starved)
    status, out, _ = here("run", *golden_options("llama"), "--output-dir", tmp_path)
    assert status == 0
    assert "ran out of memory after 7 tokens" in out
    assert len(pd.read_csv(tmp_path / "attention_sinks.csv")) == 7
    assert json.loads((tmp_path / "attention_sinks.json").read_text())["exit_reason"] == "out of memory"


def test_a_failure_in_the_middle_keeps_the_rows_and_records_itself(monkeypatch, tmp_path):
    def failing(model, keep, tokens):
        yield Steps(1, [1.0], 0.1, None, [0])
        raise RuntimeError("cable pulled")

    monkeypatch.setattr(runs, "stepwise", failing)
    from sinkbench.models import ModelSource
    from sinkbench.streams import Source

    folder = GOLDEN / "llama"
    options = runs.RunOptions(
        model=ModelSource(str(folder)), source=Source(str(folder / "tokens.jsonl"), "input_ids"), output_dir=tmp_path
    )
    with pytest.raises(RuntimeError):
        runs.run(options)
    assert len(pd.read_csv(tmp_path / "attention_sinks.csv")) == 1
    assert "cable pulled" in json.loads((tmp_path / "attention_sinks.json").read_text())["exit_reason"]
