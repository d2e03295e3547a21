"""A report tells what the files hold: final numbers, where a strategy breaks, settings, and what looks wrong."""

import csv
import json
import shlex
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import golden_options
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sinkbench.results.columns import MEASURES, Presence, known_columns
from sinkbench.results.intervals import interval
from sinkbench.results.report.collect import Group, collect
from sinkbench.results.report.comparing import compare_group
from sinkbench.results.report.markdown import escaped, fenced
from sinkbench.results.report.sections import report
from sinkbench.results.report.summary import summarise
from sinkbench.results.report.warnings import find_warnings
from sinkbench.results.report.writing import write_report
from sinkbench.results.run import Run

RESULTS = Path(__file__).parents[3] / "results"
BENCHMARK = Path(__file__).parents[2] / "fixtures" / "llama_2_7b"


def made(name="windowed", n=600, nll=2.0, seed=0, **record):
    """A clean run: steady latency, a cache that fills, a record that fits."""
    rng = np.random.default_rng(seed)
    x = np.arange(1, n + 1, dtype=float)
    values = nll + rng.normal(0, 0.3, n)
    frame = pd.DataFrame({"input_length": x, "nll": values, "ppl": np.exp(values)})
    frame["overall_ppl"] = np.exp(values.cumsum() / x)
    frame["latency"] = 0.02 * rng.uniform(0.9, 1.1, n)
    frame["kv_cache_bytes"] = 1024.0 * np.minimum(x, 64)
    frame["token"] = np.random.default_rng(7).integers(3, 250, n).astype(float)
    began = datetime(2026, 1, 2, tzinfo=UTC) + timedelta(hours=len(name))
    facts = {
        "experiment": name.split("-")[0],
        "exit_reason": "finished",
        "rows": n,
        "overall_ppl": float(frame["overall_ppl"].iloc[-1]),
        "started": began.isoformat(),
        "ended": (began + timedelta(minutes=5)).isoformat(),
        "device": "one device",
        "dtype": "float32",
        "model": {"name": "tiny", "revision": "abc"},
        "dataset": {"name": "text", "tokens": n + 1, "sha256": "0" * 64},
        "versions": {"torch": "2.0", "python": "3.11"},
    }
    return Run(name, facts["experiment"], frame.reindex(columns=known_columns()), facts | record)


def with_rows(run, **columns):
    return replace(run, frame=run.frame.assign(**columns))


def saved(run, folder):
    """``run`` as files, with the columns that it has."""
    folder.mkdir(parents=True, exist_ok=True)
    optional = [name for name in run.frame if MEASURES[name].presence is not Presence.SEED]
    empty = [name for name in optional if run.frame[name].isna().all()]
    frame = run.frame.drop(columns=empty).astype({"input_length": int})
    frame.to_csv(folder / f"{run.name}.csv", index=False)
    if run.record:
        (folder / f"{run.name}.json").write_text(json.dumps(run.record))


def cells(table):
    """Rows of a table as dictionaries of heading and text, the unit left off."""
    names = [column.heading.split(" (")[0].split(" [")[0].split("\N{NO-BREAK SPACE}")[0] for column in table.columns]
    return {row[0].text: dict(zip(names, (cell.text for cell in row))) for row in table.rows}


# what is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Real runs of a tiny model, all strategies."""
    from sinkbench.cli import main

    place = tmp_path_factory.mktemp("runs")
    for experiment in ("transformers", "windowed", "attention_sinks", "recompute"):
        main(
            [
                "run",
                "--experiment",
                experiment,
                *golden_options("llama"),
                "--num-tokens",
                "120",
                "--output-dir",
                str(place),
            ]
        )
    return place


def test_a_report_of_real_runs_has_the_numbers_of_their_csv(here, folder, tmp_path):
    status, out, _ = here("report", folder, "--output", tmp_path / "page.html")
    assert status == 0
    assert out.split() == ["saved", str(tmp_path / "page.html"), "saved", str(tmp_path / "page.md")]
    (section,) = report("title", collect([folder])).sections
    for name, shown in cells(section.results).items():
        with open(folder / f"{name}.csv") as file:
            rows = list(csv.DictReader(file))
        latency = sorted(1e3 * float(row["latency"]) for row in rows)
        assert shown["Tokens"] == str(len(rows))
        assert shown["Perplexity"] == f"{float(rows[-1]['overall_ppl']):,.3f}"
        assert float(shown["Latency, median"]) == pytest.approx(np.median(latency), abs=5e-4)
        assert float(shown["Latency, p99"]) == pytest.approx(np.percentile(latency, 99), abs=5e-4)
        held = max(int(row["kv_cache_bytes"]) for row in rows)
        assert shown["Peak KV cache"] == f"{held / 2**20:,.1f}"
        assert f"{held:,} bytes" in (tmp_path / "page.md").read_text()
    assert len(cells(section.results)) == 4


def test_settings_are_those_of_the_record(folder, tmp_path):
    for path in folder.glob("windowed.*"):
        shutil.copy(path, tmp_path)
    (section,) = report("title", collect([tmp_path])).sections
    assert section.different is None
    shared = {setting.name: setting.text for setting in section.same}
    record = json.loads((folder / "windowed.json").read_text())
    assert shared["window"] == "32"
    assert shared["dataset sha256"] == record["dataset"]["sha256"]
    assert shared["torch version"] == record["versions"]["torch"]
    assert shared["started"] == record["started"].replace("T", " ").replace("+00:00", " UTC")
    assert section.commands == [shlex.join(record["command"])]


def test_settings_in_which_runs_differ_are_set_apart(tmp_path):
    saved(made("windowed-a", options={"window_size": 64, "num_tokens": 600}), tmp_path)
    saved(made("windowed-b", options={"window_size": 128, "num_tokens": 600}), tmp_path)
    (section,) = report("title", collect([tmp_path])).sections
    found = cells(section.different)
    assert (found["windowed-a"]["Window"], found["windowed-b"]["Window"]) == ("64", "128")
    shared = {setting.name: setting.text for setting in section.same}
    assert shared["tokens asked for"] == "600"
    assert "window" not in shared


@pytest.mark.parametrize("place", ["h200/smollm2_135m_parallel", "h200/smollm2_135m_stepwise"], ids=lambda p: p[-12:])
def test_sound_results_of_this_repository_raise_no_warning(place):
    (group,) = collect([RESULTS / place])
    assert [run.name for run in group.runs] == ["transformers", "windowed", "attention_sinks"]
    assert find_warnings(group) == []


def test_dense_attention_beyond_its_training_length_is_warned_of_once():
    (section,) = report("title", collect([RESULTS / "smollm2_135m_cpu"])).sections
    assert [warning.kind for warning in section.warnings] == ["no baseline"]
    assert "8,192 tokens" in section.warnings[0].message


def test_generated_texts_are_shown_and_not_compared():
    (section,) = report("title", collect([RESULTS / "smollm2_135m_generate"])).sections
    assert section.shared is None
    assert [written.name for written in section.texts] == ["windowed", "attention_sinks"]
    assert {"Fluency", "Repetition", "Non-words"} <= {figure.heading for figure in section.figures}
    assert "different tokens" not in {warning.kind for warning in section.warnings}
    assert "ran at the same time" in {warning.kind for warning in section.warnings}  # as their records say


def test_csvs_of_the_benchmark_need_no_json():
    (section,) = report("title", collect([BENCHMARK])).sections
    assert cells(section.results)["attention_sinks"]["Perplexity"] == "5.835"
    assert not section.recorded
    assert section.commands == []


def test_each_folder_with_runs_is_a_section_however_often_it_is_given(tmp_path):
    saved(made(), tmp_path / "a" / "b")
    saved(made(), tmp_path / "c")
    saved(made(), tmp_path / ".hidden")
    groups = collect([tmp_path, tmp_path / "a"])
    assert [group.title for group in groups] == [str(tmp_path / "a" / "b"), str(tmp_path / "c")]


def test_runs_of_one_strategy_share_its_colour_and_are_in_the_order_of_their_sizes(tmp_path):
    for size in (256, 64, 1024):
        saved(made(f"windowed-window_{size}"), tmp_path)
    (section,) = report("title", collect([tmp_path])).sections
    named = [row[0] for row in section.results.rows]
    assert [cell.text for cell in named] == [f"windowed-window_{size}" for size in (64, 256, 1024)]
    assert len({cell.colour for cell in named}) == 1
    lines = json.loads(section.figures[0].json)["data"]
    assert len({line["line"]["dash"] for line in lines}) == 3


def test_runs_that_failed_before_their_first_row_and_out_of_memory_are_listed(tmp_path):
    saved(made(), tmp_path)
    saved(made("transformers", n=300, exit_reason="out of memory"), tmp_path)
    failed = {"experiment": "recompute", "exit_reason": "failed: ValueError: no such layer", "rows": 0}
    (tmp_path / "recompute.json").write_text(json.dumps(failed))
    (tmp_path / "shape.json").write_text('{"hidden_size": 64}')  # not of a run
    (section,) = report("title", collect([tmp_path])).sections
    found = cells(section.results)
    assert found["recompute"]["Outcome"] == "failed: ValueError: no such layer"
    assert found["transformers"]["Outcome"] == "out of memory after 300 tokens"
    assert found["windowed"]["Outcome"] == ""
    assert set(found) == {"transformers", "windowed", "recompute"}


def test_a_file_that_cannot_be_read_is_a_warning_and_the_others_are_shown(tmp_path):
    saved(made(), tmp_path)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "recompute.csv").write_text("")
    (tmp_path / "recompute.json").write_text('{"experiment": "recompute", "exit_reason": "running"}')
    (group,) = collect([tmp_path])
    assert [run.name for run in group.runs] == ["windowed", "recompute"]
    assert sorted(warning.kind for warning in find_warnings(group)) == [
        "never ended",
        "unreadable file",
        "unreadable file",
    ]


# what is measured


def test_of_a_thinned_file_the_perplexity_is_that_of_all_rows_and_the_interval_lies_around_it():
    run = made(n=2000)
    thinned = replace(run, frame=run.frame.iloc[4::5].reset_index(drop=True))
    found = summarise(thinned).perplexity
    assert found.value == pytest.approx(summarise(run).perplexity.value)
    logs = interval(thinned.frame["nll"].to_numpy())
    assert np.log(found.high) - np.log(found.value) == pytest.approx(logs.high - logs.value)
    assert found.low < found.value < found.high
    assert find_warnings(Group("", [thinned])) == []


def failing(name, at, n, seed=0):
    """A run that is 1.5 nats worse from token ``at`` on."""
    run = made(name, n=n, seed=seed)
    worse = run.frame["nll"] + 1.5 * (run.frame["input_length"] >= at)
    return with_rows(run, nll=worse, overall_ppl=np.exp(worse.expanding().mean()))


def test_where_a_run_breaks_is_known_also_behind_the_end_of_a_shorter_one():
    runs = [failing("transformers", 2500, 4000), failing("windowed", 500, 900), failing("attention_sinks", 10**9, 5000)]
    shared = compare_group(runs)
    assert shared.tokens == 900
    assert shared.onsets["transformers"].token == pytest.approx(2500, abs=2)
    assert shared.onsets["windowed"].token == pytest.approx(500, abs=2)
    assert shared.onsets["attention_sinks"].token is None


@pytest.mark.parametrize(("every", "known"), [(1, True), (5, True), (20, False)])
def test_rows_too_sparse_do_not_tell_where_a_run_breaks(every, known):
    runs = [failing("transformers", 10**9, 12000), failing("windowed", 6000, 12000)]
    runs = [replace(run, frame=run.frame.iloc[every - 1 :: every].reset_index(drop=True)) for run in runs]
    shared = compare_group(runs)
    assert ("windowed" in shared.onsets) == known
    assert bool(shared.not_judged) == (not known)
    if known:
        assert shared.onsets["windowed"].token == pytest.approx(6000, abs=2 * every)
    whole = compare_group([failing("transformers", 10**9, 12000), failing("windowed", 6000, 12000)])
    assert [run.loss and run.loss.value for run in shared.compared] == [
        run.loss and pytest.approx(run.loss.value) for run in whole.compared
    ]


def sections_of(*runs):
    (section,) = report("title", [Group("", list(runs))]).sections
    return section


def test_dense_attention_read_beyond_what_the_model_was_trained_for_is_a_warning_once():
    trained = {"model": {"name": "tiny", "revision": "abc", "context_length": 500}}
    section = sections_of(made("transformers", **trained), made("windowed", **trained), made("recompute", **trained))
    (warning,) = section.warnings
    assert (warning.kind, warning.runs) == ("no baseline", ("transformers",))
    assert "beyond the 500 tokens the model was trained for: from there on it is no baseline" in warning.message
    enough = {"model": trained["model"] | {"context_length": 600}}
    assert sections_of(made("transformers", **enough), made("windowed", **enough)).warnings == []


def test_dense_attention_that_fails_is_a_warning_where_no_record_says_so():
    section = sections_of(failing("transformers", 2500, 4000), failing("windowed", 10**9, 4000))
    (warning,) = [warning for warning in section.warnings if warning.kind == "no baseline"]
    assert "dense attention fails from token 2,5" in warning.message


def test_of_two_dense_runs_none_is_the_baseline_and_a_note_says_so():
    section = sections_of(made("transformers-a"), made("transformers-b", seed=1), made("windowed", seed=2))
    assert "NLL above dense" not in next(iter(cells(section.shared).values()))
    assert any("2 runs are of dense attention" in note for note in section.shared.notes)


def test_runs_over_different_tokens_are_reported_and_not_compared(tmp_path):
    other = with_rows(made("attention_sinks"), token=made().frame["token"].replace(made().frame["token"].iloc[9], 1.0))
    saved(made(), tmp_path)
    saved(other, tmp_path)
    (section,) = report("title", collect([tmp_path])).sections
    assert "different tokens" in {warning.kind for warning in section.warnings}
    assert section.shared is None
    assert set(cells(section.results)) == {"windowed", "attention_sinks"}


# warnings

N = 600
SLOWER = np.where(np.arange(N) < 300, 1.0, 2.0)
SPIKES = np.where(np.arange(N) % 40 == 39, 5.0, 1.0)
COLD = np.where(np.arange(N) < 3, 40.0, 1.0)
BEFORE = datetime(2020, 1, 1, tzinfo=UTC).isoformat()


def latency(factor):
    return lambda run: with_rows(run, latency=run.frame["latency"] * factor)


def without(*rows):
    return lambda run: replace(run, frame=run.frame.drop(index=list(rows)).reset_index(drop=True))


def recorded(**facts):
    return lambda run: replace(run, record=run.record | facts)


WRONG = {
    "warm-up": latency(COLD),
    "noisy latency": latency(SPIKES),
    "noisy latency: a slower half": latency(SLOWER),
    "clock went backwards": recorded(ended=BEFORE),
    "clock went backwards: a step": latency(np.where(np.arange(N) == 50, -1.0, 1.0)),
    "rows missing or repeated": without(100),
    "rows missing or repeated: the first": without(0, 1, 2),
    "rows missing or repeated: twice": lambda run: replace(
        run, frame=pd.concat([run.frame.iloc[:100], run.frame.iloc[99:]], ignore_index=True)
    ),
    "record does not fit": recorded(rows=900),
    "record does not fit: more rows than it says": recorded(rows=500),
    "record does not fit: another perplexity": recorded(overall_ppl=3.0),
    "NLL is not a number": lambda run: with_rows(run, nll=run.frame["nll"].where(run.frame["input_length"] != 9)),
    "perplexity does not fit": lambda run: replace(
        with_rows(run, overall_ppl=9.0), record=run.record | {"overall_ppl": 9.0}
    ),
    "never ended": recorded(exit_reason="running", rows=None),
    "mixed devices": recorded(device="another device"),
    "mixed dtypes": recorded(dtype="float16"),
    "mixed models": recorded(model={"name": "other", "revision": "abc"}),
    "mixed revisions": recorded(model={"name": "tiny", "revision": "def"}),
    "mixed versions of torch": recorded(versions={"torch": "2.1"}),
    "different tokens": lambda run: with_rows(run, token=run.frame["token"] + 1),
    "different tokens: by their fingerprint": lambda run: replace(
        with_rows(run, token=np.nan), record=run.record | {"dataset": {"tokens": N + 1, "sha256": "1" * 64}}
    ),
    "ran at the same time": lambda run: replace(
        run, record=run.record | {key: made("transformers").record[key] for key in ("started", "ended")}
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_warning_is_raised_by_what_it_is_about_and_by_nothing_else(wrong):
    clean = [made("transformers", seed=1), made("windowed")]
    assert find_warnings(Group("", clean)) == []
    found = find_warnings(Group("", [clean[0], WRONG[wrong](clean[1])]))
    assert {warning.kind for warning in found} == {wrong.split(":")[0]}
    assert all("windowed" in warning.runs for warning in found)


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 1500),
    spread=st.floats(0, 0.15),
    growth=st.floats(0, 5),
    every=st.sampled_from([1, 2, 5, 20]),
)
@settings(max_examples=60, deadline=None)
def test_a_clean_run_of_any_length_growth_and_thinning_raises_no_warning(seed, n, spread, growth, every):
    run, rng = made(n=n, seed=seed), np.random.default_rng(seed)
    slower = 0.02 * (1 + growth * np.arange(n) / n) * rng.uniform(1 - spread, 1 + spread, n)
    frame = run.frame.assign(latency=slower, kv_cache_bytes=run.frame["input_length"] * 1024)
    kept = frame.iloc[every - 1 :: every].reset_index(drop=True)
    if len(kept):
        assert find_warnings(Group("", [replace(run, frame=kept)])) == []


ANY = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(), st.text(max_size=8), st.lists(st.none()))
KEYS = ("rows", "overall_ppl", "started", "ended", "device", "dtype", "model", "versions", "dataset", "options", "text")


@given(
    record=st.dictionaries(st.sampled_from((*KEYS, "exit_reason", "command", "peak_vram_gib")), ANY),
    values=st.lists(st.floats(width=32), min_size=1, max_size=40),
)
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_whatever_the_files_hold_there_is_a_report(record, values):
    frame = made(n=len(values)).frame.assign(
        nll=values, overall_ppl=values[::-1], latency=values, cuda_vram_allocated=values
    )
    runs = [Run("windowed", "windowed", frame, record), made("attention_sinks", n=40)]
    (section,) = report("title", [Group("", runs)]).sections
    assert len(section.results.rows) == 2


# Markdown


def inlines(text):
    """What Markdown makes of one table cell: its inline tokens."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"| a |\n| --- |\n| x {text} |\n")
    kinds = [token.type for token in tokens]
    assert kinds.count("td_open") == 1
    return tokens[kinds.index("td_open") + 1].children


@given(
    st.text(
        alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("\\`*_{}[]<>#|!~&;:/.@$-+=()\"' a1")),
        max_size=40,
    )
)
@settings(max_examples=400, deadline=None)
def test_any_text_is_text_in_markdown(text):
    text = "".join(c for c in text if c.isprintable())
    found = inlines(escaped(text))
    assert {token.type for token in found} <= {"text", "text_special"}
    assert "".join(token.content for token in found) == f"x {' '.join(text.split())}".strip()


@pytest.mark.parametrize("text", ["https://example.org/x", "www.example.org", "a@example.org", "javascript://x"])
def test_what_github_would_turn_into_a_link_is_broken_up(text):
    assert text not in escaped(text)


def test_a_block_of_code_cannot_be_ended_from_within():
    found = MarkdownIt("commonmark").parse("\n".join([*fenced("a\n```\n<script>\n````\n"), "after"]))
    assert [token.type for token in found] == ["fence", "paragraph_open", "inline", "paragraph_close"]


# the command


def test_markdown_alone_is_written_where_it_is_asked_for(here, tmp_path):
    saved(made(), tmp_path / "runs")
    assert here("report", tmp_path / "runs", "--output", tmp_path / "new" / "r.md")[0] == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.md"]


def test_by_default_the_page_lies_in_the_first_folder(here, tmp_path):
    saved(made(), tmp_path / "a")
    saved(made(), tmp_path / "b")
    assert here("report", tmp_path / "a", tmp_path / "b")[0] == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"report.html", "report.md"}
    assert not (tmp_path / "b" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "--output", "page.pdf"], "must end in .html or .md"),
        (["missing"], "no folder missing"),
        (["runs", "empty"], "no result in empty"),
        (["other"], "has no column"),
        (["runs", "--output", "runs/windowed.csv/page.html"], "cannot write"),
    ],
)
def test_what_the_user_can_mend_is_one_line(here, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    saved(made(), tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").write_text("a,b\n1,2\n")
    status, out, error = here("report", *arguments)
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert out == ""


def test_a_page_of_long_runs_stays_small(tmp_path):
    for name in ("windowed", "attention_sinks"):
        saved(made(name, n=60_000), tmp_path)
    page, _ = write_report([tmp_path])
    from plotly.offline import get_plotlyjs

    assert page.stat().st_size - len(get_plotlyjs()) < 400_000
    shutil.rmtree(tmp_path)
