"""Comparisons: intervals that cover, onsets where they are, and no comparison of different tokens."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import golden_options

from sinkbench.errors import UserError
from sinkbench.results.comparison import compare_runs
from sinkbench.results.intervals import interval

N = 3000


def frame(nll, tokens=None):
    tokens = np.arange(len(nll)) if tokens is None else tokens
    return pd.DataFrame({"input_length": np.arange(1, len(nll) + 1), "nll": nll, "token": tokens})


def noise(seed, correlation=0.0):
    values = np.random.default_rng(seed).normal(size=N)
    for i in range(1, N):
        values[i] += correlation * values[i - 1]
    return values


def test_an_interval_holds_the_mean_and_widens_for_dependent_tokens():
    free, tied = interval(noise(1)), interval(noise(1, 0.9))
    assert free.low < free.value < free.high
    assert tied.high - tied.low > 3 * (free.high - free.low)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = [found.low <= 0 <= found.high for found in (interval(noise(seed, 0.5)) for seed in range(60))]
    assert 0.85 <= np.mean(covered) <= 1.0


def test_a_strategy_parts_where_it_starts_to_lose_and_fails_where_it_collapses():
    dense = 2 + 0.1 * noise(2)
    small = dense + np.where(np.arange(N) >= 1000, 0.1, 0.0)
    collapse = dense + np.where(np.arange(N) >= 2000, 3.0, 0.0)
    runs = {"transformers": frame(dense), "attention_sinks": frame(small), "windowed": frame(collapse)}
    found = {run.name: run for run in compare_runs(runs)}
    assert found["attention_sinks"].diverges == 1001
    assert found["attention_sinks"].breaks is None
    assert found["windowed"].diverges == found["windowed"].breaks == 2001
    assert found["transformers"].loss is None
    assert found["windowed"].loss.value == pytest.approx(1.0, abs=1e-9)
    assert found["windowed"].loss.low <= 1.0 <= found["windowed"].loss.high


def test_dense_attention_that_fails_past_its_context_is_said_to_fail():
    sinks = 2 + 0.1 * noise(3)
    dense = sinks + np.where(np.arange(N) >= 1500, 4.0, 0.0)
    found = {run.name: run for run in compare_runs({"transformers": frame(dense), "attention_sinks": frame(sinks)})}
    assert found["transformers"].breaks == 1501
    assert found["attention_sinks"].breaks is None
    assert found["attention_sinks"].loss.value < 0


def test_runs_of_different_length_are_compared_over_what_they_share():
    compared = compare_runs({"transformers": frame(noise(4)), "windowed": frame(noise(4)[:1000])})
    assert {run.tokens for run in compared} == {1000}


def with_overall(whole):
    return whole.assign(overall_ppl=np.exp(whole["nll"].expanding().mean()))


def save(csv, nll, every=1):
    csv.parent.mkdir(exist_ok=True)
    data = with_overall(frame(nll)).assign(ppl=1.0, cuda_vram_allocated=1.0, latency=1.0)
    data[data["input_length"] % every == 0].to_csv(csv, index=False)
    return csv


def test_a_thinned_run_is_compared_token_by_token_and_by_its_own_mean():
    dense = with_overall(frame(2 + 0.1 * noise(7)))
    windowed = with_overall(frame(dense["nll"] + np.where(np.arange(N) >= 1500, 1.0, 0.0)))
    full = {run.name: run for run in compare_runs({"transformers": dense, "windowed": windowed})}["windowed"]
    thinned = windowed[windowed["input_length"] % 3 == 0].reset_index(drop=True)
    found = {run.name: run for run in compare_runs({"transformers": dense, "windowed": thinned})}["windowed"]
    assert (found.tokens, found.spacing) == (N, 3)
    assert found.perplexity.value == pytest.approx(full.perplexity.value)
    assert found.loss.value == pytest.approx(full.loss.value)
    assert found.diverges == pytest.approx(1501, abs=3)


def test_too_few_rows_tell_no_onset_and_none_in_common_tell_nothing():
    runs = {"transformers": frame(noise(8)), "windowed": frame(noise(8) + np.where(np.arange(N) >= 9, 5.0, 0.0))}
    sparse = {name: run[run["input_length"] % 10 == 0] for name, run in runs.items()}
    assert [(run.diverges, run.breaks) for run in compare_runs(sparse)] == [(None, None)] * 2
    mean_difference = {name: run[run["input_length"] % 2 == i] for i, (name, run) in enumerate(runs.items())}
    with pytest.raises(UserError, match="share no row"):
        compare_runs(mean_difference)


def test_runs_over_different_tokens_are_refused_and_the_first_difference_named():
    other = np.arange(N)
    other[500] = 0
    with pytest.raises(UserError, match="token 501"):
        compare_runs({"transformers": frame(noise(5)), "windowed": frame(noise(5), other)})


def test_the_command_prints_a_line_for_each_run(here, tmp_path):
    for name, shift in (("transformers", 0.0), ("windowed", 0.4)):
        save(tmp_path / f"{name}.csv", 2 + noise(6) * 0.1 + shift)
    status, out, _ = here("compare", tmp_path)
    assert status == 0
    assert "windowed" in out
    assert "+0.400" in out
    assert here("compare", tmp_path / "windowed.csv")[0] == 2


def test_the_command_says_that_rows_were_left_out_and_does_not_call_it_holding(here, tmp_path):
    for name, shift in (("transformers", 0.0), ("windowed", 0.4)):
        save(tmp_path / f"{name}.csv", 2 + noise(6) * 0.1 + shift, every=25)
    status, out, _ = here("compare", tmp_path)
    assert status == 0
    assert "one row in 25" in out
    assert "+0.400" in out
    assert "holds" not in out


def test_any_run_can_be_the_baseline_and_files_of_one_name_go_by_their_folders(here, tmp_path):
    shifts = {"plain": 0.0, "graphs": 0.125}
    files = [save(tmp_path / name / "windowed.csv", 2 + noise(6) * 0.1 + shift) for name, shift in shifts.items()]
    status, out, _ = here("compare", *files, "--baseline", "plain")
    assert status == 0
    assert "+0.125" in out
    assert "|Δ|" in out
    rows = json.loads(here("compare", *files, "--baseline", "plain", "--format", "json")[1])["runs"]
    assert {row["run"]: row["mean_difference"] for row in rows} == {"plain": None, "graphs": pytest.approx(0.125)}
    status, _, error = here("compare", *files, "--baseline", "dense")
    assert status == 2
    assert "no run is called dense: --baseline can be plain, graphs" in error


def test_runs_over_different_texts_are_refused_by_the_command(here, tmp_path):
    for name, column in (("windowed", 3), ("attention_sinks", 7)):
        tokens = tmp_path / f"{name}.jsonl"
        tokens.write_text(json.dumps({"input_ids": [i * column % 500 for i in range(301)]}) + "\n")
        options = [*golden_options("llama"), "--dataset-name", tokens, "--experiment", name]
        assert here("run", *options, "--output-dir", tmp_path / "out")[0] == 0
    status, _, error = here("compare", tmp_path / "out")
    assert status == 2
    assert "not over the same tokens: they differ from token 1 on" in error


def dense_and_others(folder, breaks=10**9, **record):
    """Two windowed runs and a dense one that fails from token ``breaks`` on, with records."""
    dense = 2 + 0.1 * noise(9)
    save(folder / "transformers.csv", dense + np.where(np.arange(N) >= breaks, 2.0, 0.0))
    for size in (8, 64):
        save(folder / f"windowed-window_{size}.csv", dense + 1 / size)
    if record:
        (folder / "transformers.json").write_text(json.dumps({"experiment": "transformers", **record}))
    return folder


def lines(out, begin):
    return [line for line in out.splitlines() if line.startswith(begin)]


def test_compare_says_which_run_is_the_baseline_and_why(here, tmp_path):
    dense_and_others(tmp_path)
    status, out, _ = here("compare", tmp_path)
    assert (status, lines(out, "baseline")) == (0, ["baseline: transformers, the only run of dense attention"])
    assert "warning" not in out
    _, out, _ = here("compare", tmp_path, "--baseline", "windowed-window_8")
    assert lines(out, "baseline") == ["baseline: windowed-window_8, as --baseline says"]


def test_a_dense_run_is_the_baseline_by_its_record_whatever_its_file_is_called(here, tmp_path):
    dense_and_others(tmp_path)
    (tmp_path / "transformers.csv").rename(tmp_path / "full.csv")
    (tmp_path / "full.json").write_text(json.dumps({"experiment": "transformers"}))
    assert lines(here("compare", tmp_path)[1], "baseline") == ["baseline: full, the only run of dense attention"]


def test_of_two_dense_runs_none_is_the_baseline_and_the_table_says_how_to_choose(here, tmp_path):
    for place in ("plain", "graphs"):
        save(tmp_path / place / "transformers.csv", 2 + 0.1 * noise(9))
    status, out, _ = here("compare", tmp_path / "plain", tmp_path / "graphs")
    assert status == 0
    expected = "no baseline: 2 runs are of dense attention; --baseline NAME chooses one (plain, graphs)"
    assert lines(out, "no baseline") == [expected]
    assert "ΔNLL" not in out
    assert "perplexity" in out
    assert "ΔNLL" in here("compare", tmp_path / "plain", tmp_path / "graphs", "--baseline", "graphs")[1]


def test_without_a_dense_run_there_is_no_baseline(here, tmp_path):
    dense_and_others(tmp_path)
    status, out, _ = here("compare", *sorted(tmp_path.glob("windowed*.csv")))
    assert status == 0
    expected = (
        "no baseline: no run is of dense attention; --baseline NAME chooses one (windowed-window_64, windowed-window_8)"
    )
    assert lines(out, "no baseline") == [expected]


@pytest.mark.parametrize(("trained", "warned"), [(2048, True), (N, False), (4096, False)])
def test_dense_attention_read_beyond_what_the_model_was_trained_for_is_said_to_be_no_baseline(
    trained, warned, here, tmp_path
):
    dense_and_others(tmp_path, model={"context_length": trained})
    expected = (
        "warning: dense attention is read beyond the 2,048 tokens the model was trained for: from there on it is no "
        "baseline"
    )
    assert lines(here("compare", tmp_path)[1], "warning") == ([expected] if warned else [])


def test_a_baseline_that_fails_is_said_to_be_none_where_no_record_says_so(here, tmp_path):
    dense_and_others(tmp_path, breaks=1500)
    (warning,) = lines(here("compare", tmp_path)[1], "warning")
    assert "dense attention fails from token 1,501 on" in warning
    assert "from there on it is no baseline" in warning
    (warning,) = lines(here("compare", tmp_path, "--baseline", "transformers")[1], "warning")
    assert "no baseline" in warning


def test_a_baseline_that_fails_is_noticed_in_thinned_files_too(here, tmp_path):
    values = 2 + np.resize(noise(9), 30_000) * 0.1
    save(tmp_path / "windowed.csv", values, every=25)
    save(tmp_path / "transformers.csv", values + np.where(np.arange(30_000) >= 9000, 2.0, 0.0), every=25)
    _, out, _ = here("compare", tmp_path)
    (warning,) = lines(out, "warning")
    assert "dense attention fails, perhaps beyond" in warning
    assert "fails; too" in out  # few rows to tell where
