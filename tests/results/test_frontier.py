"""Cost against loss: which runs are on the frontier, which are one line, and what is drawn."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sinkbench.results.frontier import budgets, series_of
from sinkbench.results.frontier_figure import draw_frontier
from sinkbench.results.reading import read_runs
from sinkbench.results.recall import recall_by_distance
from sinkbench.results.recall_figure import draw_recall
from sinkbench.results.run import Run

N = 600
RESULTS = Path(__file__).parents[2] / "results"


def run(name, strategy, loss=0.0, held=None, latency=None, kl=None, **record):
    lengths = np.arange(1, N + 1)
    nll = 2.0 + loss + 0.01 * np.sin(lengths)
    frame = pd.DataFrame({"input_length": lengths, "nll": nll, "ppl": np.exp(nll), "overall_ppl": np.exp(2.0 + loss)})
    frame = frame.assign(latency=latency, kv_cache_bytes=held, token=lengths % 50, cuda_vram_allocated=np.nan)
    return Run(name, strategy, frame if kl is None else frame.assign(kl=kl), record)


def by_name(*runs):
    return {one.name: one for one in runs}


RUNS = by_name(
    run("transformers", "transformers", 0.0, 1000, 0.010),
    run("windowed-window_64", "windowed", 0.5, 64, 0.001),
    run("windowed-window_128", "windowed", 0.4, 128, 0.002),
    run("h2o-window_64", "h2o", 0.2, 64, 0.005),
    run("h2o-window_128", "h2o", 0.1, 128, 0.006),
)


def found(runs=RUNS):
    return {one.name: one for one in budgets(runs, runs["transformers"])}


def test_a_run_is_on_the_frontier_where_no_other_costs_no_more_and_loses_less():
    best = {name: (one.best, one.fastest) for name, one in found().items()}
    assert best == {
        "transformers": (True, True),
        "windowed-window_64": (False, True),
        "windowed-window_128": (False, True),
        "h2o-window_64": (True, True),
        "h2o-window_128": (True, True),
    }
    assert found()["h2o-window_128"].loss.value == pytest.approx(0.1)


def test_what_is_not_known_is_on_no_frontier_and_does_not_beat_others():
    unknown = found(RUNS | by_name(run("snapkv-window_64", "snapkv", -1.0)))
    assert (unknown["snapkv-window_64"].held, unknown["snapkv-window_64"].best) == (None, None)
    assert unknown["h2o-window_64"].best


def test_peak_and_latency_are_taken_from_the_record_where_rows_do_not_say_them():
    one = found(RUNS | by_name(run("pyramid", "pyramid", 0.3, peak_kv_cache_bytes=70, median_latency=0.003)))["pyramid"]
    assert (one.held, one.latency) == (70, 0.003)


def test_divergence_counts_where_every_run_but_the_baseline_has_it():
    runs = by_name(
        run("transformers", "transformers", 0.0, 1000),
        run("windowed", "windowed", 0.1, 64, kl=0.5),
        run("h2o", "h2o", 0.2, 64, kl=0.25),
    )
    assert {name: one.lost.value for name, one in found(runs).items()} == {
        "transformers": 0.0,
        "windowed": 0.5,
        "h2o": 0.25,
    }
    assert (found(runs)["windowed"].best, found(runs)["h2o"].best) == (False, True)
    assert "KL" in draw_frontier(list(found(runs).values()), "transformers").axes[0].get_ylabel()


def strategy(window, **parameters):
    said = {"strategy": "h2o", "parameters": parameters, "window": window}
    return {"determined_by": {"strategy": said}, "options": {"window_size": window}}


def test_runs_that_differ_in_their_window_alone_are_one_line():
    assert series_of(RUNS)["h2o-window_64"] == series_of(RUNS)["h2o-window_128"] == "h2o"
    runs = by_name(
        run("small", "h2o", **strategy(64, recent=1)),
        run("large-one", "h2o", **strategy(128, recent=1)),
        run("other", "h2o", **strategy(128, recent=2)),
    )
    assert series_of(runs) == {"small": "small", "large-one": "small", "other": "other"}
    assert series_of(by_name(run("window_64", "h2o")))["window_64"] == "h2o"


def test_losses_count_up_to_what_dense_attention_was_trained_for():
    runs = RUNS | by_name(run("transformers", "transformers", 0.0, np.arange(N), model={"context_length": 100}))
    assert found(runs)["transformers"].held == 99


def test_the_figures_have_a_line_a_strategy_and_mark_what_they_are_to_mark():
    runs = read_runs(RESULTS / "smollm2_135m_cpu")
    figure = draw_frontier(list(found().values()), "transformers")
    assert len(figure.axes) == 2  # bytes and latency
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["transformers", "windowed", "h2o", "frontier"]
    dense = runs["transformers"]
    strategies = {name: one.strategy for name, one in runs.items()}
    (ax,) = draw_recall(recall_by_distance(runs, dense), "transformers", 2, strategies).axes
    lines = {line.get_label(): line for line in ax.lines}
    assert {"windowed", "attention_sinks", "pyramid"} <= set(lines)
    assert [float(line.get_xdata()[0]) for line in ax.lines if list(line.get_xdata()) == [10, 10]] == [10.0]
    assert len(ax.collections) >= 5  # bands


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--features", "perplexity", "--ngram", "3"], "--ngram needs recall among --features"),
        (["--features", "frontier", "--tokens", "1:5"], "--tokens needs recall among --features"),
        (["--features", "vram", "--baseline", "windowed"], "--baseline needs recall or frontier among --features"),
        (["--features", "recall", "--ngram", "1"], "--ngram is 1: give 2 or more"),
        (["--features", "recall", "--tokens", "x"], "give FIRST:LAST"),
        (["--features", "frontier", "--baseline", "nobody"], "no run is called nobody"),
        (["--features", "frontiers"], "unknown feature frontiers"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(options, said, here, tmp_path):
    line = ["plot", "--output-dir", RESULTS / "smollm2_135m_cpu", "--output", tmp_path / "a.png", *options]
    status, out, error = here(*line)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error
    assert not list(tmp_path.iterdir())


def test_old_files_are_drawn_as_far_as_they_go(here, tmp_path):
    for name in ("transformers", "windowed"):
        frame = pd.read_csv(RESULTS / "smollm2_135m_cpu" / f"{name}.csv")
        frame.drop(columns=["token", "kv_cache_bytes"]).to_csv(tmp_path / f"{name}.csv", index=False)
    line = ["plot", "--output-dir", tmp_path, "--output", tmp_path / "a.png"]
    assert "no column token" in here(*line, "--features", "recall")[2]
    assert "no kv_cache_bytes" in here(*line, "--features", "frontier")[2]
    status, out, _ = here("compare", tmp_path, "--by", "budget", "--format", "json")
    assert status == 0
    assert [row["held_bytes"] for row in json.loads(out)["budgets"]] == [None, None]


def test_the_command_writes_each_figure_of_its_own_beside_the_others(here, tmp_path):
    line = ["plot", "--output-dir", RESULTS / "smollm2_135m_cpu", "--output", tmp_path / "a.svg"]
    assert here(*line, "--features", "perplexity", "recall", "frontier")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "a_frontier.svg", "a_recall.svg"]
