"""A run that was cut short goes on behind its last row, and ends as if it had never been cut."""

import json

import pandas as pd
import pytest
import tiny
from resuming import TOKENS, copied, cut, run, same

CHOOSING = [
    *((name, "model") for name in ("h2o", "tova", "knorm", "keydiff", "random")),
    *(("h2o", "q8_0"), ("keydiff", "q4_0"), ("tova", "fp8_e4m3")),
    *(("attention_sinks", "q8_0"), ("context_shift", "q4_0"), ("windowed", "fp8_e4m3"), ("transformers", "q8_0")),
    ("transformers", "kivi2:group=16,residual=32"),
]


def choosing():
    """Strategies that choose and formats that round, by both engines; most of them ``heavy``."""
    light = {("h2o", "q8_0", "stepwise"), ("attention_sinks", "q8_0", "stepwise"), ("keydiff", "q4_0", "parallel")}
    light.add(("transformers", "kivi2:group=16,residual=32", "stepwise"))
    for strategy, kv_format in CHOOSING:
        for engine in ("stepwise", "parallel"):
            marks = () if (strategy, kv_format, engine) in light else pytest.mark.heavy
            yield pytest.param(strategy, kv_format, engine, marks=marks)


def joined():
    """Every strategy cut behind its window, and sinks wherever it may be; the others are ``heavy``."""
    for family, rows in (("llama", 1), ("llama", 33), ("llama", 200), ("falcon", 130)):
        for strategy in ("attention_sinks", "windowed", "transformers", "recompute"):
            marks = () if strategy == "attention_sinks" or rows == 33 else pytest.mark.heavy
            yield pytest.param(family, rows, strategy, marks=marks)


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
@pytest.mark.parametrize(("family", "rows", "strategy"), joined())
def test_the_joined_csv_is_that_of_an_uninterrupted_run(family, strategy, rows, engine, whole, here, tmp_path):
    wanted = whole(family, strategy, engine)
    csv = copied(wanted, tmp_path)
    cut(csv, rows, "7,1.2")
    options = ("--experiment", strategy, "--engine", engine, "--chunk-size", 64, "--resume")
    assert here(*run(tmp_path, *options, family=family))[0] == 0
    same(csv, wanted)
    record = json.loads(csv.with_suffix(".json").read_text())
    assert (record["exit_reason"], record["rows"], record["resumed_at"]) == ("finished", TOKENS, [rows])


@pytest.fixture(scope="module")
def heads_of_32(tmp_path_factory):
    """Options that run on a model whose heads every format can store."""
    folder = tmp_path_factory.mktemp("heads_of_32")
    tiny.build("llama", head_dim=32, **tiny.GROUPED).save_pretrained(folder)
    (folder / "tokens.jsonl").write_text(json.dumps({"input_ids": tiny.tokens(130).tolist()}) + "\n")
    data = ("--dataset-name", folder / "tokens.jsonl", "--data-column", "input_ids", "--dtype", "float32")
    return ["run", "--model-name-or-path", folder, *data, "--window-size", 24, "--num-tokens", 120]


@pytest.mark.parametrize(("strategy", "kv_format", "engine"), choosing())
def test_what_rounding_could_decide_is_decided_as_before(strategy, kv_format, engine, heads_of_32, here, tmp_path):
    """Which entry a score evicts, and which code a number gets; begun for fewer tokens, and goes on for more."""
    how = ("--experiment", strategy, "--kv-format", kv_format, "--engine", engine, "--chunk-size", 50)
    options = [*heads_of_32, *how, "--output-dir"]
    assert here(*options, tmp_path / "whole")[0] == 0
    assert here(*options, tmp_path / "begun", "--num-tokens", 71)[0] == 0
    assert here(*options, tmp_path / "begun", "--resume")[0] == 0
    (wanted,), (csv,) = ((tmp_path / folder).glob("*.csv") for folder in ("whole", "begun"))
    ours, theirs = pd.read_csv(csv), pd.read_csv(wanted)
    assert list(ours.kv_cache_bytes) == list(theirs.kv_cache_bytes)
    assert list(ours.nll) == pytest.approx(list(theirs.nll), abs=1e-5)
    assert json.loads(csv.with_suffix(".json").read_text())["resumed_at"] == [71]


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
        (["--window-size", "16"], "window was 32 and not 16"),
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


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.heavy), 8])
def test_a_csv_cut_at_any_byte_of_its_last_row_is_whole_again(every, finished, here):
    rows = finished.read_bytes()
    last = rows[:-1].rfind(b"\n") + 1
    for size in {*range(last, len(rows), every), len(rows) - 1}:
        finished.write_bytes(rows[:size])
        assert here(*run(finished.parent, "--resume"))[0] == 0, size
        assert finished.read_bytes()[:last] == rows[:last]
        assert pd.read_csv(finished).nll.iloc[-1] == pytest.approx(float(rows[last:].split(b",")[1]), abs=2e-4)


def test_overwrite_and_resume_exclude_each_other(finished, here):
    status, _, error = here(*run(finished.parent, "--resume", "--overwrite"))
    assert (status, "exclude each other" in error) == (2, True)


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


def test_nothing_of_an_earlier_session_is_erased(finished, here):
    path = finished.with_suffix(".json")
    elsewhere = json.loads(path.read_text())
    elsewhere["device"] = elsewhere["sessions"][0]["device"] = "another machine"
    elsewhere["sessions"][0]["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(elsewhere))
    cut(finished, 100)
    assert here(*run(finished.parent, "--resume"))[0] == 0
    first, second = json.loads(path.read_text())["sessions"]
    assert (first["device"], first["versions"]["torch"]) == ("another machine", "0.1")
    assert second["device"] != "another machine"
    assert (second["first_row"], second["rows"]) == (101, TOKENS - 100)


def test_the_sessions_rows_are_those_that_are_kept_also_of_one_that_was_killed(finished, here):
    path = finished.with_suffix(".json")
    for rows in (100, 200):
        cut(finished, rows)
        left = json.loads(path.read_text())
        left["sessions"][-1] |= {"exit_reason": "running", "ended": None, "rows": 0, "seconds": 0.0}
        path.write_text(json.dumps(left))
        assert here(*run(finished.parent, "--resume"))[0] == 0
    sessions = json.loads(path.read_text())["sessions"]
    assert [(s["first_row"], s["rows"]) for s in sessions] == [(1, 100), (101, 100), (201, TOKENS - 200)]
    assert [s["exit_reason"] for s in sessions] == ["killed", "killed", "finished"]


def test_a_record_of_an_older_version_is_refused_in_one_line(finished, here):
    path = finished.with_suffix(".json")
    old = json.loads(path.read_text())
    del old["determined_by"]["strategy"]
    path.write_text(json.dumps(old))
    status, _, error = here(*run(finished.parent, "--resume"))
    assert status == 2
    assert "an older sinkbench wrote it" in error
    assert len(error.splitlines()) == 1
