"""``sinkbench.read``, ``compare`` and ``plot``: frames and figures of what runs have written."""

import base64
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from golden import DATA
from matplotlib.figure import Figure

import sinkbench
from sinkbench.cli.compare import compare as compare_command
from sinkbench.cli.plot import plot as plot_command
from sinkbench.cli.sweep import sweep as sweep_command

from .conftest import NAMED, SIZES

LLAMA_2 = DATA / "llama_2_7b"
SHOWN = {"skip_first": 5, "log_perplexity_limit": 0}  # the golden model has random weights


def offered(function) -> dict[str, object]:
    """The arguments of a function with their defaults, as the command line has them."""
    plain = {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "form"}
    return {
        name: None
        if default is inspect.Parameter.empty
        else str(default)
        if isinstance(default, Path)
        else list(default)
        if isinstance(default, tuple)
        else default
        for name, default in plain.items()
    }


@pytest.mark.parametrize(
    ("function", "command"),
    [
        (sinkbench.compare, compare_command),
        (sinkbench.plot, plot_command),
        (sinkbench.sweep, sweep_command),
    ],
)
def test_a_function_takes_what_its_command_takes_with_the_same_defaults(function, command) -> None:
    assert offered(function) == offered(command)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder with three runs."""
    folder = tmp_path_factory.mktemp("several")
    for experiment in ("transformers", "windowed", "attention_sinks"):
        sinkbench.run(**NAMED, **SIZES, experiment=experiment, output_dir=folder)
    return folder


@pytest.fixture
def several(written, tmp_path) -> Path:
    """A folder with three runs, which may be changed."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


# Read


def test_a_file_is_a_run_and_a_folder_are_runs(several) -> None:
    one = sinkbench.read(str(several / "windowed.csv"))
    assert (one.name, one.length, one.record["experiment"]) == ("windowed", 60, "windowed")
    runs = sinkbench.read(several)
    assert list(runs) == ["transformers", "windowed", "attention_sinks"]
    pd.testing.assert_frame_equal(runs["windowed"].frame, one.frame)


def test_all_rows_are_one_frame_and_all_runs_another(several) -> None:
    runs = sinkbench.read(several)
    assert runs.frame.groupby("run").size().to_dict() == dict.fromkeys(runs, 60)
    assert "fresh_nll" not in runs.frame
    assert runs.summary.loc["windowed", "perplexity"] == pytest.approx(runs["windowed"].perplexity)
    assert "<table" in runs._repr_html_()
    assert repr(runs).count("\n") == 2


def test_files_of_others_need_no_record() -> None:
    runs = sinkbench.read(LLAMA_2)
    assert set(runs.summary.exit_reason) == {"unknown"}


@pytest.mark.parametrize("place", ["./nowhere", "", 3, None])
def test_where_nothing_is_to_be_read_is_one_line(place) -> None:
    with pytest.raises(sinkbench.UserError):
        sinkbench.read(place)


# Compare


def test_a_comparison_is_a_frame_with_the_numbers_of_the_command(several, here) -> None:
    ours = sinkbench.compare(several)
    status, line, _ = here("compare", several, "--format", "json")
    theirs = json.loads(line)
    assert status == 0
    for row in theirs["runs"]:
        for name in ("perplexity", "perplexity_low", "loss", "mean_difference", "what_happened"):
            mine = ours.loc[row["run"], name]
            assert mine == row[name] or (row[name] is None and pd.isna(mine))
    assert ours.attrs["baseline"] == theirs["baseline"] == "transformers"
    assert ours.attrs["notes"] == theirs["notes"]


def test_runs_at_hand_files_and_folders_are_compared_alike(several) -> None:
    runs = sinkbench.read(several)
    wanted = sinkbench.compare(several)
    pd.testing.assert_frame_equal(sinkbench.compare(runs), wanted)
    pd.testing.assert_frame_equal(sinkbench.compare(*runs.values()), wanted)
    pd.testing.assert_frame_equal(sinkbench.compare(list(runs.values())), wanted)
    files = [several / f"{name}.csv" for name in runs]
    pd.testing.assert_frame_equal(sinkbench.compare(*files), wanted)


def test_two_runs_that_were_written_to_one_file_stay_two(run) -> None:
    first, second = run(), run(window_size=16, overwrite=True)
    found = sinkbench.compare(first, second, baseline="attention_sinks")
    assert list(found.index) == ["attention_sinks", "attention_sinks (2)"]


def test_losses_by_distance_and_by_budget_are_frames_too(several) -> None:
    distances = sinkbench.compare(several, by="recall-distance", tokens=(1, None))
    assert {"tokens_back", "loss", "share_of_loss"} <= set(distances)
    budgets = sinkbench.compare(several, by="budget")
    assert budgets.loc["windowed", "held_bytes"] > 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"by": "colour"}, r"--by must be one of recall-distance, budget"),
        ({"ngram": 3}, r"--ngram needs --by recall-distance"),
        ({"by": "recall-distance", "ngram": 1}, r"--ngram is 1: give 2 or more"),
        ({"by": "recall-distance", "tokens": "9:3"}, r"--tokens is '9:3'"),
        ({"key_tokens": ("a",)}, r"--key-tokens takes the names of two runs"),
        ({"baseline": "nobody"}, r"no run is called nobody: --baseline can be"),
    ],
)
def test_a_wrong_argument_of_compare_is_a_sentence_of_the_command(several, wrong, said) -> None:
    with pytest.raises(sinkbench.UserError, match=said):
        sinkbench.compare(several, **wrong)


def test_one_run_is_none_to_compare(several) -> None:
    with pytest.raises(sinkbench.UserError, match="at least two runs are needed"):
        sinkbench.compare(several / "windowed.csv")


# Plot


def test_a_figure_shows_itself_and_is_written_where_that_is_asked_for(several) -> None:
    before = set(several.iterdir())
    figure = sinkbench.plot(several, features="perplexity", **SHOWN)
    assert isinstance(figure, Figure)
    assert figure._repr_png_().startswith(base64.b64decode("iVBORw0KGgo="))
    assert set(several.iterdir()) == before
    sinkbench.plot(sinkbench.read(several), ["perplexity"], **SHOWN, output=several / "a.svg")
    assert (several / "a.svg").read_text().startswith("<?xml")


def test_what_is_drawn_is_what_the_command_draws(several, here) -> None:
    options = ["--output-dir", several, "--skip-first", 5, "--log-perplexity-limit", 0]
    assert here("plot", *options, "--output", several / "line.png")[0] == 0
    sinkbench.plot(several, **SHOWN, output=several / "call.png")
    assert (several / "call.png").read_bytes() == (several / "line.png").read_bytes()


def test_what_is_kept_is_a_second_figure(run) -> None:
    done = run(trace=True)
    curves, kept = sinkbench.plot(done, ["perplexity", "retention"], **SHOWN)
    assert all(isinstance(figure, Figure) for figure in (curves, kept))
    assert isinstance(sinkbench.plot(done, "retention"), Figure)


def test_losses_have_figures_of_their_own(run) -> None:
    again = list(range(3, 23)) * 20  # the golden tokens are random, and never come again
    runs = [run(experiment=name, dataset_name=again, num_tokens=300) for name in ("transformers", "windowed")]
    recall, frontier = sinkbench.plot(runs, ["recall", "frontier"], tokens=(40, None), baseline="transformers")
    assert all(isinstance(figure, Figure) for figure in (recall, frontier))


def test_a_run_that_is_not_shown_is_a_warning(run) -> None:
    short, long = run(num_tokens=5, name="short"), run(name="long")
    with pytest.warns(UserWarning, match="short is not shown"):
        sinkbench.plot([short, long], "perplexity", **{**SHOWN, "skip_first": 10})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"features": ["colour"]}, "unknown feature colour: --features takes one or more of"),
        ({"features": []}, "no feature: --features takes"),
        ({"ngram": 3}, "--ngram needs recall among --features"),
        ({"features": ["recall"], "ngram": 1}, "--ngram is 1: give 2 or more"),
        ({"features": ["frontier"], "baseline": "nobody"}, "no run is called nobody"),
        ({"skip_first": 10**6}, "no run is longer than --skip-first"),
        ({"output": "a.gif"}, "cannot tell the format of a.gif: --output must end in"),
        ({"features": 3}, r"--features must be names of features \(got 3\)"),
        ({"skip_first": 1.5}, r"--skip-first must be an integer of at least 0 \(got 1.5\)"),
        ({"log_perplexity_limit": "high"}, r"--log-perplexity-limit must be a number of at least 0 \(got "),
        ({"title": 3}, r"--title must be a text \(got 3\)"),
        ({"output": 3}, r"--output must be the name of a file \(got 3\)"),
        ({"show": "yes"}, r"--show must be true or false"),
        ({"show": True, **SHOWN}, "--show found no display"),
    ],
)
def test_a_wrong_argument_of_plot_is_a_sentence_of_the_command(several, wrong, said) -> None:
    with pytest.raises(sinkbench.UserError, match=said):
        sinkbench.plot(several, **wrong)


# Sweep


@pytest.fixture
def experiment(tmp_path) -> dict[str, object]:
    """What an experiment file would say."""
    return {**NAMED, "experiment": ["windowed", {"name": "h2o", "recent": 4}], "window-size": [np.int64(16), 32]} | {
        "num_tokens": 40,
        "output_dir": tmp_path / "sweep",
    }


def test_a_sweep_is_a_frame_and_does_not_run_again_what_is_there(experiment) -> None:
    first = sinkbench.sweep(experiment)
    assert list(first.exit_reason) == ["finished"] * 4
    assert not first.was_there.any()
    again = sinkbench.sweep(experiment)
    assert again.was_there.all()
    assert list(again.perplexity) == list(first.perplexity)
    assert sinkbench.read(*again.path).summary.perplexity.sum() == pytest.approx(first.perplexity.sum())


def test_a_file_says_the_same(experiment, tmp_path) -> None:
    file = tmp_path / "some.toml"
    lines = [f"{name} = {json.dumps(value, default=str)}" for name, value in experiment.items() if name != "experiment"]
    lines = [line.replace('["16", 32]', "[16, 32]") for line in lines]
    file.write_text("\n".join([*lines, 'experiment = ["windowed", { name = "h2o", recent = 4 }]']))
    by_file = sinkbench.sweep(str(file), output_dir=str(tmp_path / "other"))
    by_table = sinkbench.sweep(experiment)
    assert list(by_file.index) == list(by_table.index)
    assert list(by_file.perplexity) == list(by_table.perplexity)


def test_a_run_that_fails_says_why_and_the_others_go_on(experiment) -> None:
    found = sinkbench.sweep({**experiment, "model_name_or_path": ["./nowhere", experiment["model_name_or_path"]]})
    assert found.exit_reason.str.startswith("failed: no model folder './nowhere'").sum() == 4
    assert (found.exit_reason == "finished").sum() == 4


def test_a_dry_run_is_a_frame_of_costs(experiment, tmp_path) -> None:
    costs = sinkbench.sweep(experiment, dry_run=True)
    assert (costs.memory > 0).all()
    assert (costs.seconds > 0).all()
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"launcher": "slurm"}, "--launcher must be one of local, ray"),
        ({"retries": -1}, "--retries must be an integer of at least 0"),
        ({"output_dir": 3}, "--output-dir must be the name of a folder"),
        ({"dry_run": "yes"}, "--dry-run must be true or false"),
    ],
)
def test_a_wrong_argument_of_sweep_is_a_sentence(experiment, wrong, said) -> None:
    with pytest.raises(sinkbench.UserError, match=said):
        sinkbench.sweep(experiment, **wrong)


def test_a_wrong_key_of_an_experiment_is_named(experiment) -> None:
    with pytest.raises(sinkbench.UserError, match="windowsize: is not known; did you mean window_size"):
        sinkbench.sweep({**experiment, "windowsize": 3})
    with pytest.raises(sinkbench.UserError, match="engine: must be one of stepwise, parallel"):
        sinkbench.sweep({**experiment, "engine": "paralel"})
