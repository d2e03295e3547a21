"""Cells on a real Ray: workers may be killed, results are the local ones, and nothing is lost or double."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
from golden import GOLDEN

pytest.importorskip("ray", reason="Ray is not installed: pip install 'sinkbench[ray]'")

import ray as real_ray

from sinkbench.cli import main
from sinkbench.errors import UserError
from sinkbench.results.traces import tokens_in, trace_of
from sinkbench.sweeps.experiment import read_experiments
from sinkbench.sweeps.launchers import ray as launcher
from sinkbench.sweeps.launchers.transfer import checksum, place, scratch, work

LLAMA = GOLDEN / "llama"
TOKENS = 1200


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
    """Ends two workers that have written some hundred rows of a cell: one at once, one as a machine going down does."""

    def __init__(self):
        super().__init__(daemon=True)
        self.hit = {}  # the file that a worker was writing, and the rows in it
        self.left = [signal.SIGKILL, signal.SIGTERM]

    def run(self):
        deadline = time.monotonic() + 100
        while self.left and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                self._kill(process)
            time.sleep(0.01)

    def _kill(self, process):
        try:
            for path in [Path(f.path) for f in process.open_files() if f.path.endswith(".csv")]:
                rows = path.read_bytes().count(b"\n")
                if rows > 300 and path not in self.hit and self.left:
                    os.kill(process.pid, self.left.pop(0))
                    self.hit[path] = rows
        except (psutil.Error, OSError):
            pass


@pytest.mark.heavy
def test_a_killed_worker_costs_nothing_but_time(cluster, file, capsys):
    """Five cells on two workers, two ended in the middle of a cell; then the same cells in this process."""
    killer = Killer()
    killer.start()
    main(["sweep", str(file), "--launcher", "ray", "--retries", "0"])
    assert not killer.left
    assert all(300 < rows < TOKENS for rows in killer.hit.values())
    assert not any(path.parent.exists() for path in killer.hit)
    out, alone = file.parent / "out", file.parent / "alone"
    names = sorted(p.name for p in out.iterdir())
    main(["sweep", str(file), "--output-dir", str(alone)])
    assert names == sorted(p.name for p in alone.iterdir())
    assert len(names) == 10
    for csv in alone.glob("*.csv"):
        ours, local = pd.read_csv(out / csv.name), pd.read_csv(csv)
        assert list(ours.input_length) == list(range(1, TOKENS + 1))
        assert list(ours.token) == list(local.token)
        assert list(ours.kv_cache_bytes) == list(local.kv_cache_bytes)
        assert ours.nll.to_numpy() == pytest.approx(local.nll.to_numpy(), abs=2e-4)
        about, wanted = (json.loads((folder / csv.name).with_suffix(".json").read_text()) for folder in (out, alone))
        assert about.keys() == wanted.keys()
        assert about["key"] == wanted["key"]
        assert about["exit_reason"] == "finished"
        assert about["options"] == wanted["options"] | {"output_dir": str(out)}
        assert about["command"] == about["sessions"][0]["command"] == wanted["command"]
        assert about["device"] in launcher.devices()
    capsys.readouterr()
    main(["sweep", str(file), "--launcher", "ray"])
    assert capsys.readouterr().out.count("was there") == 5


@pytest.mark.heavy
def test_an_interruption_keeps_what_is_finished_and_nothing_else(cluster, file):
    out = file.parent / "interrupted"
    command = [sys.executable, "-m", "sinkbench", "sweep", str(file), "--launcher", "ray", "--output-dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not list(out.glob("*.csv")):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, lines = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, lines
    assert "Traceback" not in lines
    finished = sorted(path.stem for path in out.glob("*.csv"))
    assert 1 <= len(finished) < 5
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}{end}" for n in finished for end in (".csv", ".json")
    )
    assert all(len(pd.read_csv(path)) == TOKENS for path in out.glob("*.csv"))
    assert lines.count("interrupted (SIGINT)") == 5 - len(finished)


@pytest.mark.heavy
def test_a_cluster_that_does_not_answer_is_one_line(sinkbench, file):
    done = sinkbench(
        "sweep", file, "--launcher", "ray", "--output-dir", file.parent / "none", RAY_ADDRESS="127.0.0.1:9"
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cell_asks_for_no_more_than_a_node_has(file):
    cell = read_experiments(file).cells()[1]
    node = launcher.largest(
        [
            {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0, "memory": 2.0**30}},
            {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0, "memory": 2.0**28}},
            {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0, "memory": 2.0**40}},
        ]
    )
    assert node == {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**30}
    without = launcher.needs(cell, 0, node)
    assert without["num_cpus"] == 1
    assert "num_gpus" not in without
    size = without["memory"]
    assert 2**16 < size < 2**24
    assert launcher.needs(cell, 80 * 2**30, node)["num_gpus"] == 1
    assert launcher.needs(cell, size // 2, node)["num_gpus"] == 2  # of the three or more that it would take
    assert "num_gpus" not in launcher.needs(cell.but(device_map="cpu"), 80 * 2**30, node)
    assert "memory" not in launcher.needs(cell, 0, {**node, "memory": size - 1.0})


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not (child := os.fork()):
        with scratch() as folder:
            (tmp_path / "folder").write_text(str(folder))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = Path((tmp_path / "folder").read_text())
    assert left.is_dir()
    with scratch() as first:
        assert not left.exists()
        with scratch() as second:
            assert first.is_dir()
            assert first != second
    assert not list(left.parent.iterdir())


@pytest.mark.heavy
def test_a_cell_that_cannot_run_has_failed_and_the_others_have_not(cluster, file):
    cells = [cell.but(num_tokens=50, output_dir=file.parent / "some") for cell in read_experiments(file).cells()[:2]]
    cells[0] = cells[0].but(model_name_or_path=str(file.parent / "nowhere"))
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
def transfer(file, tmp_path):
    options = read_experiments(file).cells()[1].but(num_tokens=30, output_dir=tmp_path)
    return options, work(options)


def test_what_was_brought_back_is_put_where_it_belongs(transfer):
    options, whole = transfer
    place(whole, options)
    assert options.csv.read_bytes() == whole.rows
    assert sorted(p.name for p in options.output_dir.iterdir()) == [
        "windowed-window_16.csv",
        "windowed-window_16.json",
    ]


def test_a_trace_travels_with_its_rows_and_one_of_other_rows_does_not_stay(file, tmp_path):
    options = read_experiments(file).cells()[1].but(num_tokens=30, output_dir=tmp_path, trace=True)
    whole = work(options)
    place(whole, options)
    assert tokens_in(trace_of(options.csv)) == 30
    assert json.loads(options.csv.with_suffix(".json").read_text())["trace"] == "windowed-window_16.trace.npz"
    damaged = replace(whole, trace=whole.trace[:-1])
    with pytest.raises(UserError, match="damaged"):
        place(damaged, options)
    place(work(options.but(trace=False)), options)
    assert not trace_of(options.csv).exists()


@pytest.mark.parametrize("damage", ["a byte", "a row", "a row twice", "a number"])
def test_what_is_damaged_on_its_way_is_refused_and_nothing_is_written(damage, transfer):
    options, whole = transfer
    lines = whole.rows.splitlines(keepends=True)
    rows = {
        "a byte": whole.rows[:-2] + bytes([whole.rows[-2] ^ 1]) + whole.rows[-1:],
        "a row": b"".join(lines[:-1]),
        "a row twice": b"".join([*lines, lines[-1]]),
        "a number": b"".join(
            [*lines[:5], lines[5].replace(b",", b",nan,", 1).rsplit(b",", 2)[0] + b",0\n", *lines[6:]]
        ),
    }[damage]
    sound = whole.sha256 if damage == "a byte" else checksum(rows, whole.record)
    with pytest.raises(UserError, match="damaged" if damage == "a byte" else r"not whole|damaged"):
        place(replace(whole, rows=rows, sha256=sound), options)
    assert not list(options.output_dir.iterdir())


def test_another_runs_result_is_not_replaced_unasked(transfer):
    options, whole = transfer
    place(whole, options)
    record = json.loads(options.csv.with_suffix(".json").read_text())
    options.csv.with_suffix(".json").write_text(json.dumps(record | {"key": "another"}))
    with pytest.raises(UserError, match="of another run"):
        place(whole, options)
    place(whole, options.but(overwrite=True))


STRATEGY = '''
from sinkbench.strategies import Policy, Strategy

class LastHalf(Strategy):
    """Half of the window."""

    def policy(self, window, layer=0, layers=1):
        return Policy(max(1, window // 2))
'''


@pytest.fixture
def foreign(file, tmp_path):
    """A strategy in a file of its own, and an experiment file that names it."""
    (tmp_path / "mine.py").write_text(STRATEGY)
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("experiment", "num_tokens"))]
    path = tmp_path / "foreign.toml"
    path.write_text("\n".join([*lines, f'experiment = "{tmp_path / "mine.py"}:LastHalf"', "num_tokens = 60"]) + "\n")
    return path


def test_the_source_of_a_foreign_strategy_travels_to_where_its_file_is_not(foreign, tmp_path):
    here = read_experiments(foreign).cells()[0].but(output_dir=tmp_path / "here")
    source = (tmp_path / "mine.py").read_bytes()
    (tmp_path / "mine.py").unlink()
    transfer = work(here, source)
    place(transfer, here)
    record = json.loads(here.csv.with_suffix(".json").read_text())
    assert here.csv.name == "last_half-window_16.csv"
    assert record["experiment"] == "last_half"
    assert record["options"]["experiment"] == here.experiment
    assert max(pd.read_csv(here.csv).kv_cache_bytes) == 8 * min(pd.read_csv(here.csv).kv_cache_bytes)


@pytest.mark.heavy
def test_a_foreign_strategy_is_swept_on_workers_as_it_is_here(cluster, foreign, tmp_path):
    main(["sweep", str(foreign), "--launcher", "ray", "--output-dir", str(tmp_path / "there")])
    main(["sweep", str(foreign), "--output-dir", str(tmp_path / "here")])
    for name in ("last_half-window_16", "last_half-window_32"):
        records = [json.loads((tmp_path / folder / f"{name}.json").read_text()) for folder in ("there", "here")]
        assert records[0]["key"] == records[1]["key"]
        rows = [pd.read_csv(tmp_path / folder / f"{name}.csv") for folder in ("there", "here")]
        assert rows[0].nll.to_numpy() == pytest.approx(rows[1].nll.to_numpy(), abs=2e-4)
