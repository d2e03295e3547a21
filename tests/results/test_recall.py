"""Loss by recall distance: distances as a dictionary finds them, the figures of the repository, planted copies."""

import csv
import io
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sinkbench.errors import UserError
from sinkbench.results.onset import recall_onset
from sinkbench.results.reading import read_runs
from sinkbench.results.recall import recall_by_distance, recall_distances
from sinkbench.results.resampling import group_sums
from sinkbench.results.run import Run

REPOSITORY = Path(__file__).parents[2] / "results" / "smollm2_135m_cpu"


def rows(tokens, nll=None, lengths=None):
    lengths = np.arange(1, len(tokens) + 1) if lengths is None else lengths
    nll = np.zeros(len(tokens)) if nll is None else nll
    overall = np.exp(np.cumsum(nll) / np.arange(1, len(tokens) + 1))
    base = {"input_length": lengths, "nll": nll, "ppl": np.exp(nll), "overall_ppl": overall}
    return pd.DataFrame(base | {"cuda_vram_allocated": np.nan, "latency": np.nan, "token": tokens})


def by_hand(frame, ngram):
    """Distances by a dictionary of the n-grams of each stream."""
    found, seen, stream = [], {}, []
    for length, token in zip(frame["input_length"], frame["token"], strict=True):
        if length == 1:
            seen, stream = {}, []
        stream.append(token)
        gram = tuple(stream[-ngram:])
        known = len(gram) == ngram
        found.append(len(stream) - seen[gram] if known and gram in seen else 0)
        if known:
            seen[gram] = len(stream)
    return found


@pytest.mark.parametrize("ngram", [2, 3, 5, 8])
@pytest.mark.parametrize("streams", [[400], [150, 1, 3, 246]])
def test_distances_are_those_that_a_dictionary_finds_within_each_stream(ngram, streams):
    tokens = np.random.default_rng(ngram).integers(0, 3, sum(streams)) * 10**6
    frame = rows(tokens, lengths=np.concatenate([np.arange(1, n + 1) for n in streams]))
    assert recall_distances(frame, ngram).tolist() == by_hand(frame, ngram)


def test_an_ngram_longer_than_the_text_was_never_seen():
    assert recall_distances(rows(np.zeros(5)), 6).tolist() == [0] * 5
    assert recall_distances(rows(np.zeros(5)), 10**9).tolist() == [0] * 5


def test_the_figures_of_the_repository_are_found_again():
    runs = read_runs(REPOSITORY)
    recalled = {run.name: run for run in recall_by_distance(runs, runs["transformers"])}
    sinks = recalled["attention_sinks"]
    assert (sinks.first, sinks.last, sinks.window) == (1025, 8192, 1024)
    assert sinks.whole.loss.value == pytest.approx(0.030, abs=5e-4)
    losses = {octave.low: octave.loss.value for octave in sinks.octaves}
    near = [losses[low] for low in (16, 32, 64, 128, 256)]
    assert (min(near), max(near)) == (pytest.approx(-0.006, abs=1e-3), pytest.approx(0.024, abs=1e-3))
    assert losses[512] == pytest.approx(0.061, abs=5e-4)
    assert losses[1024] == pytest.approx(0.130, abs=5e-4)
    assert losses[2048] == pytest.approx(0.179, abs=5e-4)
    assert sinks.beyond.share == pytest.approx(0.098, abs=1e-3)
    assert sinks.beyond.share_of_loss == pytest.approx(0.47, abs=0.01)
    # of a window of 1,024, sinks take four places: what lies further back is lost
    assert 920 <= recalled["windowed"].onset <= 1126
    assert 920 <= sinks.onset <= 1126


def test_octaves_add_up_to_all_tokens_and_to_all_of_the_loss():
    runs = read_runs(REPOSITORY)
    for run in recall_by_distance(runs, runs["transformers"], tokens=(None, 11_264)):
        parts = [*run.octaves, run.never]
        assert sum(part.tokens for part in parts) == run.whole.tokens == 11_264 - 1024
        assert sum(part.share for part in parts) == pytest.approx(1)
        assert sum(part.share_of_loss for part in parts) == pytest.approx(1)
        assert run.within.tokens + run.beyond.tokens + run.never.tokens == run.whole.tokens
        assert all(part.loss.low <= part.loss.value <= part.loss.high for part in parts)


def planted(window, length=60_000, seed=0):
    """A text of tokens seen once, but for copies of 32 tokens from 2^6 to 2^14 back, and the losses of a window."""
    draw = np.random.default_rng(seed)
    tokens = np.arange(length) + 10
    place = 2**14 + 100
    while place + 32 < length:
        back = int(2 ** draw.uniform(6, 14))
        tokens[place : place + 32] = tokens[place - back : place - back + 32]
        place += 200
    distances = recall_distances(rows(tokens), 2)
    lost = np.where(distances > window, 4.0, 0.0)
    return tokens, lost + draw.normal(0, 1.0, length)


@pytest.mark.parametrize("window", [100, 256, 1024, 3000])
def test_a_loss_of_planted_copies_sets_in_at_the_window(window):
    tokens, loss = planted(window)
    dense = np.full(len(tokens), 3.0)
    runs = {
        "transformers": Run("transformers", "transformers", rows(tokens, dense)),
        "windowed": Run("windowed", "windowed", rows(tokens, dense + loss), {"options": {"window_size": window}}),
    }
    (found,) = recall_by_distance(runs, runs["transformers"])
    assert found.onset == pytest.approx(window, rel=0.1)
    assert found.beyond.loss.value == pytest.approx(4.0, abs=0.2)
    assert abs(found.within.loss.value) < 0.2


def test_a_loss_that_does_not_depend_on_distance_sets_in_nowhere():
    draw = np.random.default_rng(3)
    distances = np.where(draw.random(5000) < 0.5, 0, 2 ** draw.uniform(0, 12, 5000)).astype(int)
    found = [recall_onset(np.random.default_rng(seed).normal(1.0, 1.0, 5000), distances) for seed in range(20)]
    assert found.count(None) >= 16
    assert recall_onset(np.ones(10), np.ones(10, int)) is None


def test_intervals_of_a_group_cover_the_truth_about_as_often_as_they_say():
    covered = []
    for seed in range(60):
        draw = np.random.default_rng(seed)
        groups = (draw.random(3000) < 0.2).astype(int)
        found = group_sums(draw.normal(groups * 1.0, 1.0), groups, 2).mean([1])
        covered.append(found.low <= 1.0 <= found.high)
    assert 0.85 <= np.mean(covered) <= 1.0


def saved(folder, name, frame, **record):
    frame.to_csv(folder / f"{name}.csv", index=False)
    if record:
        (folder / f"{name}.json").write_text(json.dumps({"experiment": name, **record}))


@pytest.fixture
def folder(tmp_path):
    tokens, loss = planted(256, 26_000)
    saved(tmp_path, "transformers", rows(tokens, np.full(26_000, 3.0)))
    saved(tmp_path, "windowed", rows(tokens, 3.0 + loss), options={"window_size": 256})
    return tmp_path


def test_the_command_prints_octaves_for_people_and_unrounded_rows_for_programs(here, folder):
    status, out, _ = here("compare", folder, "--by", "recall-distance")
    assert status == 0
    assert "windowed, window 256: loss against transformers, tokens 257 to 26,000" in out
    for row in ("256 to 511", "never seen before", "beyond the window"):
        assert row in out
    status, out, error = here("compare", folder, "--by", "recall-distance", "--format", "json")
    document = json.loads(out)
    assert (status, document["baseline"], document["ngram"]) == (0, "transformers", 2)
    assert "baseline: transformers" in error
    by_range = {row["tokens_back"]: row for row in document["recall"]}
    assert by_range["512 to 1,023"]["distance_from"] == 512
    assert by_range["512 to 1,023"]["loss_low"] <= 4.0 <= by_range["512 to 1,023"]["loss_high"]
    (about,) = document["runs"]
    assert (about["run"], about["window"], about["first_token"]) == ("windowed", 256, 257)
    lines = list(csv.DictReader(io.StringIO(here("compare", folder, "--by", "recall-distance", "--format", "csv")[1])))
    assert [float(line["loss"]) for line in lines] == [row["loss"] for row in document["recall"]]
    assert {line["onset"] for line in lines} == {str(about["onset"])}


def test_tokens_and_ngrams_can_be_chosen(here, folder):
    line = ("compare", folder, "--by", "recall-distance", "--format", "json")
    document = json.loads(here(*line, "--tokens", "18001:19000", "--ngram", "4")[1])
    everything = next(row for row in document["recall"] if row["tokens_back"] == "all")
    assert (everything["tokens"], document["ngram"]) == (1000, 4)


def test_a_thinned_run_is_compared_where_another_has_every_token(here, folder):
    frame = pd.read_csv(folder / "windowed.csv")
    frame[frame["input_length"] % 10 == 0].to_csv(folder / "windowed.csv", index=False)
    document = json.loads(here("compare", folder, "--by", "recall-distance", "--format", "json")[1])
    beyond = next(row for row in document["recall"] if row["tokens_back"] == "beyond the window")
    assert beyond["loss"] == pytest.approx(4.0, abs=0.5)
    dense = pd.read_csv(folder / "transformers.csv")
    dense[dense["input_length"] % 10 == 0].to_csv(folder / "transformers.csv", index=False)
    status, _, error = here("compare", folder, "--by", "recall-distance")
    assert (status, error.count("\n")) == (2, 1)
    assert "no run has a row of every token" in error


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--by", "recall-distance", "--ngram", "1"], "--ngram is 1: give 2 or more"),
        (["--by", "recall-distance", "--ngram", "x"], "--ngram"),
        (["--ngram", "3"], "--ngram needs --by recall-distance"),
        (["--tokens", "1:5"], "--tokens needs --by recall-distance"),
        (["--by", "recall-distance", "--tokens", "9"], "give FIRST:LAST"),
        (["--by", "recall-distance", "--tokens", "9:3"], "LAST no less than FIRST"),
        (["--by", "recall-distance", "--tokens", "30000:"], "no token of windowed is from 30,000"),
        (["--by", "distance"], "recall-distance"),
        (["--by", "recall-distance", "--baseline", "h2o"], "no run is called h2o"),
        (["--by", "recall-distance", "--key-tokens", "transformers", "windowed"], "leave out --by"),
        (["--format", "yaml"], "json"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options, said, here, folder):
    status, out, error = here("compare", folder, *options)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error


def test_files_without_tokens_are_refused_and_say_why(here, folder):
    for path in folder.glob("*.csv"):
        pd.read_csv(path).drop(columns="token").to_csv(path, index=False)
    status, _, error = here("compare", folder, "--by", "recall-distance")
    assert (status, error.count("\n")) == (2, 1)
    assert "no column token" in error
    assert here("compare", folder)[0] == 0


def test_runs_without_a_baseline_are_refused(here, folder):
    (folder / "transformers.csv").rename(folder / "pyramid.csv")
    status, _, error = here("compare", folder, "--by", "recall-distance")
    assert status == 2
    assert "needs a baseline" in error


def test_an_nll_that_is_no_number_is_left_out_and_counted():
    tokens, loss = planted(256, 18_000)
    loss[17_000:17_010] = np.nan
    runs = {
        name: Run(name, name, rows(tokens, nll))
        for name, nll in (("transformers", np.full(18_000, 3.0)), ("windowed", 3.0 + loss))
    }
    (found,) = recall_by_distance(runs, runs["transformers"])
    assert found.not_finite == 10
    assert np.isfinite(found.whole.loss.value)
    runs["windowed"] = Run("windowed", "windowed", rows(tokens, np.full(18_000, np.nan)))
    with pytest.raises(UserError, match="no NLL of windowed is a number"):
        recall_by_distance(runs, runs["transformers"])


@pytest.mark.heavy
def test_a_million_rows_take_at_most_five_seconds(tmp_path):
    draw = np.random.default_rng(0)
    tokens, n = draw.zipf(1.3, 10**6) % 49_152, 10**6
    for name in ("transformers", "windowed"):
        saved(tmp_path, name, rows(tokens, draw.gamma(2, 1.3, n)))
    begin = time.process_time()
    runs = read_runs(tmp_path)
    (found,) = recall_by_distance(runs, runs["transformers"])
    assert time.process_time() - begin < 5
    assert found.whole.tokens == n
