"""Killed at any moment, any number of times, a run ends as if it had never been: no row lost, none double."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import await_rows, begun, ended, kill, killed, running, size, stream_of
from processes import finished as to_its_end
from resuming import TOKENS, cut, run, same

LONG = 4000


@pytest.fixture(scope="module")
def long_stream(tmp_path_factory):
    return stream_of(tmp_path_factory.mktemp("long") / "long.jsonl", LONG + 1)


class Complete:
    """The complete rows of a file, of which none may go or change."""

    def __init__(self, csv):
        self.csv, self.seen, self.grew = csv, b"", 0

    def check(self):
        rows = self.csv.read_bytes() if self.csv.exists() else b""
        complete = rows[: rows.rfind(b"\n") + 1]
        assert complete.startswith(self.seen), "a complete row was lost or changed"
        self.grew, self.seen = self.grew + (len(complete) > len(self.seen)), complete


def closed(csv, rows):
    """The record of a run that has come to its end, beside which nothing is left."""
    record = json.loads(csv.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"]) == ("finished", rows)
    files = sorted(p.name for p in csv.parent.iterdir() if p.is_file())
    assert files == [csv.name, csv.with_suffix(".json").name], "something was left behind"
    return record


@pytest.mark.parametrize(
    ("strategy", "engine", "kills"),
    [
        ("attention_sinks", "stepwise", 5),
        ("attention_sinks", "parallel", 4),
        pytest.param("attention_sinks", "stepwise", 25, marks=pytest.mark.heavy),
        pytest.param("windowed", "stepwise", 15, marks=pytest.mark.heavy),
        pytest.param("transformers", "stepwise", 10, marks=pytest.mark.heavy),
        pytest.param("attention_sinks", "parallel", 15, marks=pytest.mark.heavy),
    ],
)
def test_killed_at_random_moments_again_and_again_nothing_is_lost_and_nothing_is_double(
    strategy, engine, kills, whole, tmp_path, chance
):
    """While loading, priming, writing, between rows. Each time the run is resumed."""
    wanted = whole("llama", strategy, engine)
    options = ("--experiment", strategy, "--engine", engine, "--chunk-size", 64)
    csv, command = tmp_path / f"{strategy}.csv", run(tmp_path, *options, "--resume")
    begin = time.monotonic()
    to_its_end(run(tmp_path / "probe", *options))
    length = time.monotonic() - begin
    print(f"an undisturbed run takes {length:.2f} s")
    complete, left = Complete(csv), kills
    for _ in range(15 * kills):  # some end before they are killed
        if not left:
            break
        if killed(command, chance.uniform(0, length)):
            # it came to its end: cut it anywhere, so that the next one has something to do
            cut(csv, chance.randrange(1, TOKENS))
            complete.seen = b""
        else:
            left -= 1
        complete.check()
    assert not left
    to_its_end(command)
    same(csv, wanted)
    closed(csv, TOKENS)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("strategy", "engine", "chunk", "kills", "writing"),
    [("attention_sinks", "stepwise", 64, 60, 0.03), ("windowed", "parallel", 8, 20, 0.01)],
)
def test_one_run_that_is_killed_over_and_over_ends_as_if_it_had_never_been(
    strategy, engine, chunk, kills, writing, long_stream, tmp_path, chance
):
    """Half of the kills come at any moment from the start on, half soon after a row was written."""
    data = ("--dataset-name", long_stream, "--num-tokens", LONG)
    options = ("--experiment", strategy, "--engine", engine, "--chunk-size", chunk, *data)
    begin = time.monotonic()
    to_its_end(run(tmp_path / "whole", *options, "--num-tokens", 1))
    start = time.monotonic() - begin
    print(f"a start takes {start:.2f} s")
    command, csv = run(tmp_path, *options, "--resume"), tmp_path / f"{strategy}.csv"
    complete = Complete(csv)
    for number in range(kills):
        if number % 2:
            before, child = size(csv), begun(command)
            await_rows(csv, child, before)
            time.sleep(chance.uniform(0, writing))
            assert running(child), "it came to its end before it was killed"
            kill(child)
        else:
            assert not killed(command, chance.uniform(0, start))
        complete.check()
    assert complete.grew >= kills // 2
    to_its_end(command)
    to_its_end(run(tmp_path / "whole", *options, "--overwrite"))
    same(csv, tmp_path / "whole" / csv.name)
    record = closed(csv, LONG)
    assert 0 < record["timed_rows"] < LONG
    assert record["tokens_per_second"] == pytest.approx(record["timed_rows"] / record["seconds"])


@pytest.mark.heavy
def test_so_does_one_of_the_whole_command_line(long_stream, tmp_path, chance):
    data = ("--dataset-name", long_stream, "--num-tokens", LONG)
    command, csv = run(tmp_path, *data, "--resume"), tmp_path / "attention_sinks.csv"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for early in (True, False, False, False):
        before = size(csv)
        process = subprocess.Popen([sys.executable, "-m", "sinkbench", *command], stdout=subprocess.DEVNULL, env=env)
        if early:
            time.sleep(chance.uniform(0, 4))
        else:
            while size(csv) <= before and process.poll() is None:
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    to_its_end(command)
    to_its_end(run(tmp_path / "whole", *data))
    same(csv, tmp_path / "whole" / csv.name)


@pytest.mark.parametrize("rows", [0, 100])
def test_of_several_that_resume_at_the_same_moment_one_writes(rows, whole, finished):
    """The others are refused, or come when it is finished."""
    if rows:
        cut(finished, rows)
    else:
        finished.unlink()
    ends = [ended(child) for child in [begun(run(finished.parent, "--resume")) for _ in range(4)]]
    assert 0 in ends
    assert set(ends) <= {0, 2}
    same(finished, whole("llama", "attention_sinks", "stepwise"))
    closed(finished, TOKENS)
