"""A run that was cut short goes on behind its last row, and ends as if it had never been cut."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from conftest import golden_options

from sinkbench.cli import main

NUMBERS = ["ppl", "overall_ppl"]
TOKENS = 300


def run(out, *more, family="llama"):
    return ["run", *golden_options(family), "--num-tokens", str(TOKENS), "--output-dir", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The CSV of a run that nothing disturbed, by family, strategy and engine; made when it is first asked for."""
    made = {}

    def of(family, strategy, engine):
        key = (family, strategy, engine)
        if key not in made:
            out = tmp_path_factory.mktemp("whole")
            main(run(out, "--experiment", strategy, "--engine", engine, "--chunk-size", 64, family=family))
            made[key] = out / f"{strategy}.csv"
        return made[key]

    return of


def same(csv, whole):
    """Each row once, and the numbers of an undisturbed run within rounding."""
    ours, wanted = pd.read_csv(csv), pd.read_csv(whole)
    assert list(ours.columns) == list(wanted.columns)
    assert list(ours.input_length) == list(wanted.input_length)
    assert list(ours.token) == list(wanted.token)
    assert list(ours.kv_cache_bytes) == list(wanted.kv_cache_bytes)
    assert ours.nll.to_numpy() == pytest.approx(wanted.nll.to_numpy(), abs=2e-4)
    for column in NUMBERS:
        assert ours[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), rel=2e-4)


def cut(csv, rows, rest=""):
    """Leave ``rows`` rows and the beginning of another, and the record of a run that was killed."""
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(lines[: rows + 1]) + rest)
    path = csv.with_suffix(".json")
    record = json.loads(path.read_text())
    kept = {name: record[name] for name in record if name not in ("rows", "seconds", "overall_ppl", "median_latency")}
    path.write_text(json.dumps(kept | {"exit_reason": "running", "ended": None}))


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize("strategy", ["attention_sinks", "windowed", "transformers", "recompute"])
@pytest.mark.parametrize(("family", "rows"), [("llama", 1), ("llama", 33), ("llama", 200), ("falcon", 130)])
def test_the_joined_csv_is_that_of_an_uninterrupted_run(family, strategy, rows, engine, whole, here, tmp_path):
    wanted = whole(family, strategy, engine)
    csv = tmp_path / wanted.name
    for suffix in (".csv", ".json"):
        csv.with_suffix(suffix).write_bytes(wanted.with_suffix(suffix).read_bytes())
    cut(csv, rows, "7,1.2")
    options = ("--experiment", strategy, "--engine", engine, "--chunk-size", 64, "--resume")
    assert here(*run(tmp_path, *options, family=family))[0] == 0
    same(csv, wanted)
    record = json.loads(csv.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"], record["resumed_at"]) == ("finished", TOKENS, [rows])


@pytest.fixture
def finished(whole, tmp_path):
    """A finished run of its own: the CSV."""
    source = whole("llama", "attention_sinks", "stepwise")
    for suffix in (".csv", ".json"):
        (tmp_path / f"attention_sinks{suffix}").write_bytes(source.with_suffix(suffix).read_bytes())
    return tmp_path / "attention_sinks.csv"


def test_without_a_csv_it_begins_at_the_beginning(whole, here, tmp_path):
    assert here(*run(tmp_path, "--resume"))[0] == 0
    same(tmp_path / "attention_sinks.csv", whole("llama", "attention_sinks", "stepwise"))
    assert "resumed_at" not in json.loads((tmp_path / "attention_sinks.json").read_text())


def test_a_finished_run_is_left_alone(finished, here):
    before = [(p.name, p.read_bytes()) for p in sorted(finished.parent.iterdir())]
    status, out, _ = here(*run(finished.parent, "--resume"))
    assert status == 0
    assert "finished" in out
    assert before == [(p.name, p.read_bytes()) for p in sorted(finished.parent.iterdir())]


def test_a_finished_run_goes_on_for_more_tokens(whole, here, tmp_path):
    assert here(*run(tmp_path), "--num-tokens", "100")[0] == 0
    assert here(*run(tmp_path, "--resume"))[0] == 0
    same(tmp_path / "attention_sinks.csv", whole("llama", "attention_sinks", "stepwise"))


def test_all_rows_there_but_the_record_open_is_closed_without_another_row(finished, here):
    rows = finished.read_bytes()
    cut(finished, TOKENS)
    assert here(*run(finished.parent, "--resume"))[0] == 0
    assert finished.read_bytes() == rows
    record = json.loads(finished.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"]) == ("finished", TOKENS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--window-size", "16"], "recent was 28 and not 12"),
        (["--engine", "parallel"], "engine was stepwise and not parallel"),
        (["--dtype", "bfloat16"], "dtype was float32 and not bfloat16"),
        (["--num-tokens", "90"], "more than the 90 asked for"),
    ],
)
def test_another_run_is_not_continued(options, told, finished, here):
    before = finished.read_bytes()
    status, _, error = here(*run(finished.parent, "--resume"), *options)
    assert status == 2
    assert told in error
    assert len(error.splitlines()) == 1
    assert finished.read_bytes() == before


def test_another_text_is_noticed_at_its_first_token_that_differs(finished, here, tmp_path):
    ids = [int(token) for token in pd.read_csv(finished).token]
    ids[49] = (ids[49] + 1) % 500
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"input_ids": [1, *ids]}) + "\n")
    status, _, error = here(*run(finished.parent, "--resume"), "--dataset-name", other)
    assert status == 2
    assert "line 51 is of another text" in error


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda lines: [*lines[:40], "oops\n", *lines[41:]], "line 41 is damaged"),
        (lambda lines: [*lines[:40], *lines[41:]], "line 41 is damaged"),
        (lambda lines: [*lines[:40], lines[40].replace(",", ",x", 1), *lines[41:]], "line 41 is damaged"),
        (lambda lines: ["a,b\n", *lines[1:]], "its columns are not"),
    ],
)
def test_damage_in_the_middle_is_told_with_its_line_and_nothing_is_touched(damage, told, finished, here):
    finished.write_text("".join(damage(finished.read_text().splitlines(keepends=True))))
    before = finished.read_bytes()
    status, _, error = here(*run(finished.parent, "--resume"))
    assert status == 2
    assert told in error
    assert "--overwrite" in error
    assert finished.read_bytes() == before


@pytest.mark.parametrize("record", [None, "{", "[]", "{}"])
def test_without_a_record_that_says_what_it_is_a_csv_is_not_continued(record, finished, here):
    path = finished.with_suffix(".json")
    path.unlink() if record is None else path.write_text(record)
    status, _, error = here(*run(finished.parent, "--resume"))
    assert status == 2
    assert "record" in error


def test_a_csv_cut_at_any_byte_of_its_last_row_is_whole_again(finished, here):
    rows = finished.read_bytes()
    last = rows[:-1].rfind(b"\n") + 1
    for size in range(last, len(rows)):
        finished.write_bytes(rows[:size])
        assert here(*run(finished.parent, "--resume"))[0] == 0, size
        assert finished.read_bytes()[:last] == rows[:last]
        assert pd.read_csv(finished).nll.iloc[-1] == pytest.approx(float(rows[last:].split(b",")[1]), abs=2e-4)


def test_overwrite_and_resume_exclude_each_other(finished, here):
    status, _, error = here(*run(finished.parent, "--resume", "--overwrite"))
    assert (status, "exclude each other" in error) == (2, True)


def begun(command):
    """Carry out ``command`` in a process of its own, which has all imports behind it; its id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    status = 1
    try:
        main(command)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        os._exit(status)


def killed(command, seconds):
    """Carry out ``command`` in a process of its own, killed after so many seconds; whether it came to its end."""
    child = begun(command)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.WIFEXITED(status)
            assert os.WEXITSTATUS(status) == 0
            return True
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.parametrize(
    ("strategy", "engine", "kills"),
    [
        ("attention_sinks", "stepwise", 25),
        ("windowed", "stepwise", 15),
        ("transformers", "stepwise", 10),
        ("attention_sinks", "parallel", 15),
    ],
)
def test_killed_at_random_moments_again_and_again_nothing_is_lost_and_nothing_is_double(
    strategy, engine, kills, whole, tmp_path
):
    """65 SIGKILLs in all: while loading, priming, writing, between rows. Each time the run is resumed."""
    wanted = whole("llama", strategy, engine)
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    csv = tmp_path / f"{strategy}.csv"
    command = run(tmp_path, "--experiment", strategy, "--engine", engine, "--chunk-size", 64, "--resume")
    begin = time.monotonic()
    assert killed(run(tmp_path / "probe", "--experiment", strategy, "--engine", engine, "--chunk-size", 64), 60)
    length = time.monotonic() - begin
    print(f"seed {seed}, an undisturbed run takes {length:.2f} s")
    seen, left = b"", kills
    for _ in range(6 * kills):
        if not left:
            break
        if killed(command, chance.uniform(0, length)):
            # it came to its end: cut it anywhere, so that the next one has something to do
            cut(csv, chance.randrange(1, TOKENS))
            seen = b""
        else:
            left -= 1
        rows = csv.read_bytes() if csv.exists() else b""
        complete = rows[: rows.rfind(b"\n") + 1]
        assert complete.startswith(seen), "a complete row was lost or changed"
        seen = complete
    assert not left
    assert killed(command, 60)
    same(csv, wanted)
    assert json.loads(csv.with_suffix(".json").read_text())["exit_reason"] == "finished"
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith(".")) == [
        ".csv",
        ".json",
    ]


LONG = 4000


@pytest.fixture(scope="module")
def long_stream(tmp_path_factory):
    path = tmp_path_factory.mktemp("long") / "long.jsonl"
    path.write_text(json.dumps({"input_ids": [i * 7 % 500 for i in range(LONG + 1)]}) + "\n")
    return path


def size(csv):
    return csv.stat().st_size if csv.exists() else 0


def killed_while_writing(command, csv, seconds):
    """Carry out ``command``, killed so many seconds after its first new row is in ``csv``."""
    before, child = size(csv), begun(command)
    deadline = time.monotonic() + 60
    while size(csv) <= before:
        assert time.monotonic() < deadline
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended without a row"
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it came to its end before it was killed"


@pytest.mark.parametrize(
    ("strategy", "engine", "chunk", "kills", "writing"),
    [("attention_sinks", "stepwise", 64, 60, 0.03), ("windowed", "parallel", 8, 20, 0.01)],
)
def test_one_run_that_is_killed_over_and_over_ends_as_if_it_had_never_been(
    strategy, engine, chunk, kills, writing, long_stream, tmp_path
):
    """Half of the kills come at any moment from the start on, half soon after a row was written."""
    data = ("--dataset-name", long_stream, "--num-tokens", LONG)
    options = ("--experiment", strategy, "--engine", engine, "--chunk-size", chunk, *data)
    begin = time.monotonic()
    assert killed(run(tmp_path / "whole", *options, "--num-tokens", 1), 60)
    start = time.monotonic() - begin
    seed = random.randrange(10**6)
    print(f"seed {seed}, a start takes {start:.2f} s")
    chance = random.Random(seed)
    command, csv = run(tmp_path, *options, "--resume"), tmp_path / f"{strategy}.csv"
    seen, grew = b"", 0
    for kill in range(kills):
        if kill % 2:
            killed_while_writing(command, csv, chance.uniform(0, writing))
        else:
            assert not killed(command, chance.uniform(0, start))
        rows = csv.read_bytes() if csv.exists() else b""
        complete = rows[: rows.rfind(b"\n") + 1]
        assert complete.startswith(seen), "a complete row was lost or changed"
        grew, seen = grew + (len(complete) > len(seen)), complete
    assert grew >= kills // 2
    assert killed(command, 60)
    assert killed(run(tmp_path / "whole", *options, "--overwrite"), 60)
    same(csv, tmp_path / "whole" / csv.name)
    record = json.loads(csv.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"]) == ("finished", LONG)
    assert 0 < record["timed_rows"] < LONG
    assert record["tokens_per_second"] == pytest.approx(record["timed_rows"] / record["seconds"])
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "something was left behind"


def test_so_does_one_of_the_whole_command_line(long_stream, tmp_path):
    data = ("--dataset-name", long_stream, "--num-tokens", LONG)
    command, csv = run(tmp_path, *data, "--resume"), tmp_path / "attention_sinks.csv"
    chance = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
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
    assert killed(command, 60)
    assert killed(run(tmp_path / "whole", *data), 60)
    same(csv, tmp_path / "whole" / csv.name)


def test_the_speed_of_a_run_that_was_killed_is_that_of_the_rows_whose_time_is_known(finished, here):
    cut(finished, 200)
    path = finished.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 0.0, "timed_rows": 0}))
    assert here(*run(finished.parent, "--resume"))[0] == 0
    record = json.loads(path.read_text())
    assert (record["rows"], record["timed_rows"]) == (TOKENS, TOKENS - 200)
    assert record["tokens_per_second"] == pytest.approx((TOKENS - 200) / record["seconds"])
    assert record["median_latency"] == pytest.approx(pd.read_csv(finished).latency.median())


def test_a_changed_digit_in_an_nll_is_noticed(finished, here):
    lines = finished.read_text().splitlines(keepends=True)
    cells = lines[40].split(",")
    cells[1] = str(float(cells[1]) + 0.001)
    finished.write_text("".join([*lines[:40], ",".join(cells), *lines[41:]]))
    status, _, error = here(*run(finished.parent, "--resume"))
    assert (status, "line 41 is damaged" in error) == (2, True)


@pytest.mark.parametrize("rows", [0, 100])
def test_of_several_that_resume_at_the_same_moment_one_writes(rows, whole, finished):
    """The others are refused, or come when it is finished."""
    if rows:
        cut(finished, rows)
    else:
        finished.unlink()
    children = [begun(run(finished.parent, "--resume")) for _ in range(4)]
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert 0 in ends
    assert set(ends) <= {0, 2}
    same(finished, whole("llama", "attention_sinks", "stepwise"))
    assert json.loads(finished.with_suffix(".json").read_text())["exit_reason"] == "finished"
