"""Ctrl-C in a notebook: what is finished is kept, and the caller's own handlers are where they were."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

import sinkbench
from sinkbench.signals import handed_on

from .conftest import NAMED


@pytest.fixture
def interrupting(tmp_path: Path) -> Iterator[Callable[[int], None]]:
    """Sends a signal to this process once a run has written some rows."""
    ended = threading.Event()

    def send(number: int) -> None:
        csv = tmp_path / "attention_sinks.csv"
        while not ended.is_set():
            if csv.exists() and csv.read_bytes().count(b"\n") > 5:
                os.kill(os.getpid(), number)
                return
            time.sleep(0.002)

    started: list[threading.Thread] = []

    def call(number: int) -> None:
        started.append(threading.Thread(target=send, args=(number,)))
        started[-1].start()

    yield call
    ended.set()
    for thread in started:
        thread.join()


def test_the_rows_so_far_are_kept_and_a_resumed_run_ends_as_an_undisturbed_one(run, interrupting, tmp_path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupting(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(num_tokens=250, dtype="float32")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    rows = len(pd.read_csv(tmp_path / "attention_sinks.csv"))
    assert 5 <= rows < 250
    done = run(num_tokens=250, dtype="float32", resume=True)
    assert done.record["resumed_at"] == [rows]
    assert done.record["sessions"][0]["exit_reason"] == "interrupted (SIGINT)"
    whole = run(num_tokens=250, dtype="float32", output_dir=tmp_path / "whole")
    assert done.frame.nll.to_numpy() == pytest.approx(whole.frame.nll.to_numpy(), abs=2e-4)


def test_a_sweep_ends_with_the_run_that_was_cut_and_the_same_call_goes_on(interrupting, tmp_path) -> None:
    experiment = {**NAMED, "experiment": ["attention_sinks", "windowed"], "num_tokens": 250, "output_dir": tmp_path}
    interrupting(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        sinkbench.sweep(experiment)
    assert sinkbench.read(tmp_path / "attention_sinks.csv").exit_reason == "interrupted (SIGINT)"
    assert not (tmp_path / "windowed.csv").exists()
    assert list(sinkbench.sweep(experiment).exit_reason) == ["finished", "finished"]
    assert len(sinkbench.read(tmp_path / "attention_sinks.csv").record["resumed_at"]) == 1


def test_a_handler_of_the_callers_gets_the_signal_behind_the_run(run, interrupting) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        interrupting(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # the handler lets the program go on, but there is no whole result
            run(num_tokens=250)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_a_signal_that_the_caller_ignores_ends_nothing(run, interrupting) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupting(signal.SIGINT)
        assert run(num_tokens=250).exit_reason == "finished"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread_it_runs_and_installs_nothing(run) -> None:
    found = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    while thread.is_alive():
        assert signal.getsignal(signal.SIGINT) is before
        thread.join(0.01)
    assert [done.length for done in found] == [60]


def test_an_error_is_raised_as_it_is_and_leaves_no_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        handed_on(lambda: 1 / 0)
    assert signal.getsignal(signal.SIGINT) is before
