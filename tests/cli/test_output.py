"""What commands print for programs, how tables fit a terminal, and what runs are called."""

import csv
import io
import json
from pathlib import Path

import pytest
from golden import GOLDEN

from sinkbench.cli.layout import lines_of
from sinkbench.results.intervals import Interval
from sinkbench.results.naming import distinguishing_names
from sinkbench.results.table import Column, Table

RESULTS = Path(__file__).parents[2] / "results"
LLAMA = GOLDEN / "llama"


@pytest.fixture
def commands(tmp_path):
    file = tmp_path / "sweep.toml"
    file.write_text(
        f"model_name_or_path = '{LLAMA}'\ndataset_name = '{LLAMA / 'tokens.jsonl'}'\ndata_column = 'input_ids'\n"
        f"dtype = 'float32'\nnum_tokens = 200\nexperiment = ['attention_sinks', 'windowed']\n"
        f"window_size = [40]\nattention_sink_size = 4\noutput_dir = '{tmp_path / 'out'}'\n"
    )
    timed = ["--steps", "2", "--num-tokens", "20", "--dense-tokens", "0", "--window-size", "16"]
    return {
        "compare": ["compare", RESULTS / "smollm2_135m_cpu"],
        "recall": ["compare", RESULTS / "smollm2_135m_cpu", "--by", "recall-distance"],
        "budget": ["compare", RESULTS / "smollm2_135m_cpu", "--by", "budget"],
        "key tokens": ["compare", RESULTS / "smollm2_135m_cpu", "--key-tokens", "transformers", "windowed"],
        "strategies": ["strategies"],
        "sweep": ["sweep", file, "--dry-run"],
        "speed": ["speed", "--model-name-or-path", LLAMA, *timed],
        "doctor": ["doctor"],
    }


QUICK = ("compare", "recall", "budget", "key tokens", "strategies", "sweep")
NAMES = (*QUICK, *(pytest.param(name, marks=pytest.mark.heavy) for name in ("speed", "doctor")))


@pytest.mark.parametrize("name", NAMES)
def test_a_command_prints_one_document_of_the_same_values_in_every_format(name, commands, here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = {form: here(*commands[name], "--format", form) for form in ("json", "csv", "markdown")}
    assert len({status for status, _, _ in printed.values()}) == 1
    document = json.loads(printed["json"][1])
    rows = list(csv.DictReader(io.StringIO(printed["csv"][1])))
    records = next(value for value in document.values() if isinstance(value, list))
    assert len(rows) == len(records) > 1
    assert set(records[0]) <= set(rows[0])
    for note in document["notes"]:
        assert note in printed["json"][2]
        assert note not in printed["csv"][1]
    lines = printed["markdown"][1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    assert all(line.startswith("|") for line in lines[start : start + 2 + len(rows)])
    if name not in ("speed", "doctor"):  # which measure anew
        for row, record in zip(rows, records, strict=True):
            for key, value in record.items():
                assert row[key] == "" if value in (None, {}) else isinstance(value, dict) or row[key] == plain(value)


def plain(value):
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_numbers_for_programs_are_not_rounded(here):
    rows = json.loads(here("compare", RESULTS / "smollm2_135m_cpu", "--format", "json")[1])["runs"]
    perplexities = [row["perplexity"] for row in rows]
    assert all(round(value, 6) != value for value in perplexities)
    assert perplexities[0] == pytest.approx(8.8276, abs=1e-4)


def test_a_sweep_that_runs_has_no_document(commands, here):
    status, out, error = here(*commands["sweep"][:2], "--format", "json")
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert "--format needs --dry-run" in error


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_ten_runs_of_several_folders_fit_a_terminal_and_no_number_is_broken(width, here, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    source = RESULTS / "smollm2_135m_cpu"
    for folder in ("a_machine_with_a_long_name", "another"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for path in [*source.glob("*.csv"), *source.glob("*.json")]:
            (tmp_path / folder / "deep" / path.name).symlink_to(path)
    folders = [tmp_path / folder / "deep" for folder in ("a_machine_with_a_long_name", "another")]
    status, out, _ = here("compare", *folders, "--baseline", "another/transformers")
    assert status == 0
    table, _, _ = out.partition("baseline: ")
    assert max(map(len, table.splitlines())) <= width
    assert table.count("[15.34, 18.68]") == 2
    assert table.count("+0.650") == 2
    if width <= 60:  # names stand above their values
        joined = "".join(table.split())
        assert "another/windowed" in joined
        assert "a_machine_with_a_long_name/windowed" in joined


def names(*places):
    return distinguishing_names([Path(place) for place in places])


def test_names_are_as_short_as_tells_runs_apart():
    assert names("/r/a/windowed", "/r/a/h2o") == ["windowed", "h2o"]
    assert names("/r/plain/windowed", "/r/graphs/windowed") == ["plain", "graphs"]
    assert names("/r/plain/x/windowed", "/r/graphs/x/windowed") == ["plain", "graphs"]
    assert names("/r/a/windowed", "/r/b/windowed", "/r/b/h2o") == ["a/windowed", "b/windowed", "h2o"]
    assert names("/r/a/x/windowed", "/r/b/x/windowed", "/r/b/x/h2o") == ["a/windowed", "b/windowed", "h2o"]
    assert names("/r/a/x/windowed", "/r/b/windowed") == ["x", "b"]
    assert names("/r/a/windowed", "/r/b/windowed", "/r/b/x/h2o") == ["a/windowed", "b/windowed", "h2o"]
    assert names("/r/windowed") == ["windowed"]


def test_a_file_that_is_given_twice_is_one_run(here):
    folder = RESULTS / "smollm2_135m_cpu"
    rows = json.loads(here("compare", folder, folder / "windowed.csv", "--format", "json")[1])["runs"]
    assert [row["run"] for row in rows].count("windowed") == 1


def test_what_would_move_the_cursor_is_spelled_out():
    table = Table("t", "", [Column("run", "run"), Column("x", "x", ".1f")], [["a\x1b[2Jb\n", 1.0]])
    assert "a\\x1b[2Jb\\n  1.0" in "\n".join(lines_of(table, 80))


def test_wide_characters_take_two_columns():
    table = Table("t", "", [Column("run", "run"), Column("x", "x", ".1f")], [["漢字", 1.0], ["ab", 10.0]])
    assert lines_of(table, 80)[2:] == ["漢字   1.0", "ab    10.0"]


def test_a_column_without_values_is_left_out_for_people_and_stays_for_programs():
    table = Table("t", "", [Column("run", "run"), Column("x", "x", ".1f", interval=True)], [["a", None]])
    assert lines_of(table, 80) == ["run", "───", "a"]
    assert table.records() == [{"run": "a", "x": None, "x_low": None, "x_high": None}]
    found = Table("t", "", table.columns, [["a", Interval(1.0, 0.5, 2.0)]])
    assert found.records() == [{"run": "a", "x": 1.0, "x_low": 0.5, "x_high": 2.0}]
