"""Cells on a real Ray: workers may be killed, results are the local ones, and nothing is lost or double."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from conftest import GOLDEN

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sinkbench[ray]'")

import ray as real_ray

from sinkbench.cli import main
from sinkbench.errors import UserError
from sinkbench.experiments import read
from sinkbench.launchers import ray as launcher

LLAMA = GOLDEN / "llama"
TOKENS = 8000
CELLS = ("transformers", "windowed-window_16", "windowed-window_32", "attention_sinks-window_16")


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    real_ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    yield
    real_ray.shutdown()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    tokens = folder / "long.jsonl"
    tokens.write_text(json.dumps({"input_ids": [i * 7 % 500 for i in range(TOKENS + 1)]}) + "\n")
    options = {
        "model_name_or_path": str(LLAMA),
        "dataset_name": str(tokens),
        "data_column": "input_ids",
        "experiment": ["transformers", "windowed", "attention_sinks"],
        "window_size": [16, 32],
        "dtype": "float32",
        "num_tokens": TOKENS,
        "output_dir": str(folder / "out"),
    }
    path = folder / "long.toml"
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in options.items()) + "\n")
    return path


class Killer(threading.Thread):
    """Kills one worker that has written some hundred rows of a cell."""

    def __init__(self):
        super().__init__(daemon=True)
        self.rows = 0

    def run(self):
        deadline = time.monotonic() + 100
        while not self.rows and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                self.rows = self.rows or self._kill(process)
            time.sleep(0.01)

    @staticmethod
    def _kill(process):
        try:
            paths = [f.path for f in process.open_files() if f.path.endswith(".csv")]
            rows = sum(Path(path).read_bytes().count(b"\n") for path in paths)
            if rows > 300:
                os.kill(process.pid, signal.SIGKILL)
                return rows
        except (psutil.Error, OSError):
            pass
        return 0


def test_a_killed_worker_costs_nothing_but_time(cluster, file, capsys):
    """Five cells on two workers, one killed in the middle of its cell; then the same cells in this process."""
    killer = Killer()
    killer.start()
    main(["sweep", str(file), "--launcher", "ray", "--retries", "0"])
    assert 300 < killer.rows < TOKENS
    out, alone = file.parent / "out", file.parent / "alone"
    names = sorted(p.name for p in out.iterdir())
    main(["sweep", str(file), "--output-dir", str(alone)])
    assert names == sorted(p.name for p in alone.iterdir())
    assert len(names) == 10
    for csv in alone.glob("*.csv"):
        ours, local = pd.read_csv(out / csv.name), pd.read_csv(csv)
        assert list(ours.input_length) == list(range(1, TOKENS + 1))
        assert list(ours.token) == list(local.token)
        assert ours.nll.to_numpy() == pytest.approx(local.nll.to_numpy(), abs=2e-4)
        about, wanted = (json.loads((folder / csv.name).with_suffix(".json").read_text()) for folder in (out, alone))
        assert about["key"] == wanted["key"]
        assert about["exit_reason"] == "finished"
        assert about["options"]["output_dir"] == str(out)
        assert about["command"] == wanted["command"]
    capsys.readouterr()
    main(["sweep", str(file), "--launcher", "ray"])
    assert capsys.readouterr().out.count("was there") == 5


def test_a_cell_that_cannot_run_has_failed_and_the_others_have_not(cluster, file):
    cells = [replace(cell, num_tokens=50, output_dir=file.parent / "some") for cell in read(file).cells()[:2]]
    cells[0] = replace(cells[0], model=replace(cells[0].model, name=str(file.parent / "nowhere")))
    results = {}
    launcher.launch(cells, 1, lambda index: None, lambda index, result: results.setdefault(index, []).append(result))
    assert [len(results[index]) for index in (0, 1)] == [1, 1]
    assert results[0][0].exit_reason.startswith("failed: no model folder")
    assert results[1][0].exit_reason == "finished"
    assert sorted(p.name for p in (file.parent / "some").iterdir()) == [
        "windowed-window_16.csv",
        "windowed-window_16.json",
    ]


@pytest.fixture
def brought(file, tmp_path):
    options = replace(read(file).cells()[1], num_tokens=30, output_dir=tmp_path)
    return options, launcher.work(options)


def test_what_was_brought_back_is_put_where_it_belongs(brought):
    options, whole = brought
    launcher.place(whole, options)
    assert options.csv.read_bytes() == whole.rows
    assert sorted(p.name for p in options.output_dir.iterdir()) == [
        "windowed-window_16.csv",
        "windowed-window_16.json",
    ]


@pytest.mark.parametrize("damage", ["a byte", "a row", "a row twice", "a number"])
def test_what_is_damaged_on_its_way_is_refused_and_nothing_is_written(damage, brought):
    options, whole = brought
    lines = whole.rows.splitlines(keepends=True)
    rows = {
        "a byte": whole.rows[:-2] + bytes([whole.rows[-2] ^ 1]) + whole.rows[-1:],
        "a row": b"".join(lines[:-1]),
        "a row twice": b"".join([*lines, lines[-1]]),
        "a number": b"".join(
            [*lines[:5], lines[5].replace(b",", b",nan,", 1).rsplit(b",", 2)[0] + b",0\n", *lines[6:]]
        ),
    }[damage]
    sound = whole.sha256 if damage == "a byte" else launcher._sum(rows, whole.record)
    with pytest.raises(UserError, match="damaged" if damage == "a byte" else r"not whole|damaged"):
        launcher.place(replace(whole, rows=rows, sha256=sound), options)
    assert not list(options.output_dir.iterdir())


def test_another_runs_result_is_not_replaced_unasked(brought):
    options, whole = brought
    launcher.place(whole, options)
    record = json.loads(options.csv.with_suffix(".json").read_text())
    options.csv.with_suffix(".json").write_text(json.dumps(record | {"key": "another"}))
    with pytest.raises(UserError, match="of another run"):
        launcher.place(whole, options)
    launcher.place(whole, replace(options, overwrite=True))
