"""``--trace``: a file beside the rows that covers exactly these, whatever happened to them."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from golden import GOLDEN
from resuming import TOKENS, cut, run

from sinkbench.cli import main
from sinkbench.results.traces import HELD, read_trace, tokens_in, trace_of, write_trace
from sinkbench.runs import run as runs

STRATEGIES = ("h2o", "tova", "attention_sinks", "transformers")
EVERY = ("csv", "json", "trace.npz")


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """The folder of runs with traces that nothing disturbed."""
    out = tmp_path_factory.mktemp("traced")
    for strategy in STRATEGIES:
        main(run(out, "--experiment", strategy, "--trace"))
    return out


@pytest.fixture
def h2o(traced, tmp_path):
    """A finished run with a trace, of its own: the CSV."""
    for suffix in EVERY:
        shutil.copy(traced / f"h2o.{suffix}", tmp_path)
    return tmp_path / "h2o.csv"


def record(csv):
    return json.loads(csv.with_suffix(".json").read_text())


def same_trace(csv, wanted):
    assert np.array_equal(read_trace(trace_of(csv)).lifetime, read_trace(wanted).lifetime)
    assert record(csv)["trace"] == trace_of(csv).name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_trace_lies_beside_the_rows_and_the_record_names_it(strategy, traced):
    kept = read_trace(traced / f"{strategy}.trace.npz")
    assert record(traced / f"{strategy}.csv")["trace"] == f"{strategy}.trace.npz"
    assert (kept.strategy, kept.lifetime.shape) == (strategy, (3, 2, TOKENS))
    held = (kept.lifetime == HELD).sum(-1)
    assert (held == (TOKENS if strategy == "transformers" else 32)).all()


def test_docs_read_it_so(traced):
    """The lines of docs/strategies.md."""
    trace = np.load(traced / "h2o.trace.npz")
    lifetime = trace["lifetime"]
    died = np.where(lifetime > 0, np.arange(trace["tokens"]) + lifetime - 1, -1)
    assert died.shape == (3, 2, TOKENS)
    assert [(died[1, 0] == step).sum() for step in range(TOKENS)] == [0] * 32 + [1] * (TOKENS - 32)


def test_it_changes_no_number_and_no_key(traced, here, tmp_path):
    assert here(*run(tmp_path, "--experiment", "h2o"))[0] == 0
    assert not list(tmp_path.glob("*.npz"))
    assert "trace" not in record(tmp_path / "h2o.csv")
    assert record(tmp_path / "h2o.csv")["key"] == record(traced / "h2o.csv")["key"]


@pytest.mark.parametrize("rows", [1, 40, 200])
@pytest.mark.parametrize("before", [True, False])
def test_of_a_resumed_run_it_is_that_of_the_whole(before, rows, traced, h2o, here):
    cut(h2o, rows)
    if not before:
        trace_of(h2o).unlink()
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--resume"))[0] == 0
    same_trace(h2o, traced / "h2o.trace.npz")


@pytest.mark.parametrize("strategy", ["h2o", "attention_sinks"])
def test_of_a_finished_run_that_has_none_it_is_made_alone(strategy, traced, here, tmp_path):
    for suffix in ("csv", "json"):
        shutil.copy(traced / f"{strategy}.{suffix}", tmp_path)
    csv = tmp_path / f"{strategy}.csv"
    before, rows = record(csv), csv.read_bytes()
    assert here(*run(tmp_path, "--experiment", strategy, "--trace", "--resume"))[0] == 0
    same_trace(csv, traced / f"{strategy}.trace.npz")
    assert csv.read_bytes() == rows
    after = record(csv)
    assert after["sessions"] == before["sessions"]
    assert (after["exit_reason"], after["rows"], after["seconds"]) == ("finished", TOKENS, before["seconds"])


def test_a_run_that_has_one_is_left_alone(h2o, here):
    before = {path.name: path.read_bytes() for path in h2o.parent.iterdir()}
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--resume"))[0] == 0
    assert before == {path.name: path.read_bytes() for path in h2o.parent.iterdir()}


@pytest.mark.parametrize("how", ["--overwrite", "--resume"])
def test_an_old_one_does_not_stay_beside_new_rows(how, h2o, here):
    if how == "--resume":
        cut(h2o, 50)
    assert here(*run(h2o.parent, "--experiment", "h2o", how))[0] == 0
    assert not trace_of(h2o).exists()
    assert "trace" not in record(h2o)


def test_overwriting_writes_another(h2o, here, traced):
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--overwrite", "--window-size", 16))[0] == 0
    assert (read_trace(trace_of(h2o)).windows == 16).all()


def test_of_a_run_that_fails_it_covers_the_rows_that_are_there(h2o, here, traced, tmp_path, monkeypatch):
    close = runs._write

    def failing(steps, *more):
        def some():
            for step in steps:
                yield step
                if step[1].first == 100:
                    raise RuntimeError("cable pulled")

        close(some(), *more)

    monkeypatch.setattr(runs, "_write", failing)
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--overwrite"))[0] == 70
    assert tokens_in(trace_of(h2o)) == record(h2o)["rows"] == 100
    monkeypatch.undo()
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--resume"))[0] == 0
    same_trace(h2o, traced / "h2o.trace.npz")


def test_a_run_that_fails_before_its_first_new_row_leaves_the_old_one(h2o, here, monkeypatch):
    cut(h2o, 50)
    kept = read_trace(trace_of(h2o))
    write_trace(trace_of(h2o), type(kept)("h2o", kept.layers, kept.windows, kept.lifetime[:, :, :50]))
    before = trace_of(h2o).read_bytes()

    def failing(*more):
        raise RuntimeError("cable pulled")

    monkeypatch.setattr(runs, "_write", failing)
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--resume"))[0] == 70
    assert trace_of(h2o).read_bytes() == before
    assert record(h2o)["trace"] == "h2o.trace.npz"


def test_a_finished_run_stays_finished_if_its_trace_cannot_be_made(h2o, here, monkeypatch):
    trace_of(h2o).unlink()
    before = h2o.with_suffix(".json").read_bytes()
    monkeypatch.setattr(runs, "_write", lambda *more: os.kill(os.getpid(), signal.SIGINT))
    assert here(*run(h2o.parent, "--experiment", "h2o", "--trace", "--resume"))[0] == 130
    assert h2o.with_suffix(".json").read_bytes() == before
    assert not trace_of(h2o).exists()


def test_recompute_keeps_nothing_and_says_so(here, tmp_path):
    status, _, error = here(*run(tmp_path, "--experiment", "recompute", "--trace", "--engine", "parallel"))
    assert status == 0
    assert "nothing to trace" in error
    assert not list(tmp_path.glob("*.npz"))


@pytest.fixture
def file(tmp_path):
    """An experiment file over the golden model."""
    options = {
        "model_name_or_path": str(GOLDEN / "llama"),
        "dataset_name": str(GOLDEN / "llama" / "tokens.jsonl"),
        "data_column": "input_ids",
        "experiment": ["windowed", "tova", "recompute"],
        "window_size": [16],
        "dtype": "float32",
        "num_tokens": 60,
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "traced.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items()))
    return path


def test_a_sweep_makes_the_traces_of_what_is_finished_without_another_row(file, here):
    out = file.parent / "out"
    assert here("sweep", file)[0] == 0
    rows = {path.name: path.read_bytes() for path in out.glob("*.csv")}
    _, table, _ = here("sweep", file, "--trace")
    assert table.count("was there") == 1  # recompute, which keeps nothing
    assert rows == {path.name: path.read_bytes() for path in out.glob("*.csv")}
    assert {path.name for path in out.glob("*.npz")} == {"windowed.trace.npz", "tova.trace.npz"}
    assert here("sweep", file, "--trace")[1].count("was there") == 3


def test_from_runs_to_the_figure(file, here):
    out = file.parent / "out"
    file.write_text(file.read_text() + "trace = true\n")
    assert here("sweep", file)[0] == 0
    status, told, error = here("plot", "--output-dir", out, "--features", "retention")
    assert (status, told) == (0, f"saved {out / 'retention.png'}\n")
    assert error == "note: recompute has no trace: it carries no cache\n"
    assert (out / "retention.png").read_bytes()[:4] == b"\x89PNG"
