"""``--reference``: three columns more, on record and in the key, and what is said of a reference that is none."""

import json

import pandas as pd
import pytest
import torch
from golden import golden_options
from resuming import TOKENS, cut, run, same

from sinkbench.config import ModelSource, RunConfig, Source
from sinkbench.data.stream import read_stream
from sinkbench.errors import UserError
from sinkbench.models.loading import load_model, load_tokenizer, locate
from sinkbench.runs.key import identified
from sinkbench.strategies.reference import reference_by, span
from sinkbench.strategies.registry import chosen_by

COLUMNS = ["kl", "same_top", "reference_nll"]
engines = pytest.mark.parametrize("engine", ["stepwise", "parallel"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of both engines with the same reference, one with none, and the reference itself."""
    from sinkbench.cli import main

    out = tmp_path_factory.mktemp("diverging")
    for engine in ("stepwise", "parallel"):
        main(run(out / engine, "--reference", "transformers", "--engine", engine, "--chunk-size", 64))
    main(run(out / "alone", "--experiment", "transformers", "--engine", "parallel"))
    main(run(out / "stepwise", "--experiment", "transformers", "--reference", "transformers"))
    return out


STEPWISE, PARALLEL, ALONE, ITSELF = (
    *("stepwise/attention_sinks.csv", "parallel/attention_sinks.csv"),
    *("alone/transformers.csv", "stepwise/transformers.csv"),
)


def rows(csv):
    return pd.read_csv(csv, float_precision="round_trip")


def test_a_row_has_the_nll_of_the_reference_and_the_divergence_from_it(folder):
    found, dense = rows(folder / STEPWISE), rows(folder / ALONE)
    assert list(found.columns)[-3:] == COLUMNS
    assert found.reference_nll.to_numpy() == pytest.approx(dense.nll.to_numpy(), abs=2e-4)
    assert found.kl[:32].max() < 1e-6 < 0.001 < found.kl[100:].mean()
    assert set(found.same_top) == {0, 1}
    assert {line.split(",")[-2] for line in (folder / STEPWISE).read_text().splitlines()[1:]} == {"0", "1"}


def test_both_engines_write_the_same(folder):
    one, other = rows(folder / STEPWISE), rows(folder / PARALLEL)
    assert one.kl.to_numpy() == pytest.approx(other.kl.to_numpy(), abs=1e-4)
    assert (one.same_top == other.same_top).mean() > 0.99
    assert other.latency.isna().all() and one.latency.notna().all()


def test_of_itself_there_is_none(folder):
    found = rows(folder / ITSELF)
    assert (found.kl == 0).all() and (found.same_top == 1).all() and (found.nll == found.reference_nll).all()


def test_without_a_reference_nothing_is_added(folder):
    assert not set(COLUMNS) & set(rows(folder / ALONE).columns)
    assert "reference" not in json.loads((folder / ALONE).with_suffix(".json").read_text())


@engines
def test_a_run_cut_short_goes_on_as_if_it_had_not_been(engine, folder, here, tmp_path):
    wanted = folder / engine / "attention_sinks.csv"
    for suffix in (".csv", ".json"):
        (tmp_path / wanted.name).with_suffix(suffix).write_bytes(wanted.with_suffix(suffix).read_bytes())
    cut(tmp_path / wanted.name, 130, "7,1.2")
    options = ("--reference", "transformers", "--engine", engine, "--chunk-size", 64, "--resume")
    assert here(*run(tmp_path, *options))[0] == 0
    same(tmp_path / wanted.name, wanted)
    ours, theirs = rows(tmp_path / wanted.name), rows(wanted)
    for column in COLUMNS:
        assert ours[column].to_numpy() == pytest.approx(theirs[column].to_numpy(), abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ((), "reference was transformers and not None"),
        (("--reference", "windowed"), "was transformers and not windowed"),
    ],
)
def test_it_does_not_go_on_with_another_reference(reference, said, folder, here):
    before = (folder / STEPWISE).read_bytes()
    status, _, err = here(*run(folder / "stepwise", *reference, "--resume"))
    assert status == 2
    assert said in err and err.count("\n") == 1
    assert (folder / STEPWISE).read_bytes() == before


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("transformer", "--reference transformer"),
        ("strategies.py:Mine", "give a name of `sinkbench strategies`"),
        ("", "--reference"),
    ],
)
def test_what_is_no_reference_is_one_line_and_nothing_is_written(reference, said, here, tmp_path):
    status, _, err = here(*run(tmp_path / "out", "--reference", reference))
    assert status == 2
    assert said in err and err.count("\n") == 1
    assert "--experiment" not in err
    assert not (tmp_path / "out").exists()


def key_of(**changes):
    config = RunConfig(**changes)
    return identified(config, chosen_by(config), [torch.arange(3)], "sha256:0")["key"]


def test_the_key_covers_it():
    assert key_of() != key_of(reference="transformers") != key_of(reference="windowed")
    assert key_of(reference="windowed") != key_of(reference="windowed", window_size=5)


def test_the_reference_has_the_window_of_the_run_and_what_else_is_its_own():
    config = RunConfig(experiment="windowed", window_size=64, kv_format="q8_0", attention_sink_size=7)
    found = reference_by(config.but(reference="attention_sinks"))
    assert (found.name, found.window, str(found.format), found.strategy.sinks) == ("attention_sinks", 64, "model", 4)
    assert reference_by(config) is None


def test_the_run_s_own_strategy_as_a_reference_is_the_one_that_is_run_in_the_format_of_the_model():
    config = RunConfig(experiment="h2o", set={"recent": 9}, positions="text", kv_format="q8_0", reference="h2o")
    run_as, found = chosen_by(config), reference_by(config)
    assert found.strategy == run_as.strategy and found.positions == "text"
    assert (str(run_as.format), str(found.format)) == ("q8_0", "model")


def test_a_reference_beyond_the_training_length_is_said_to_be_none_once_everywhere(here, tmp_path):
    path = tmp_path / "model"
    here(*_short(path, tmp_path / "out", "attention_sinks"))
    status, _, err = here(*_short(path, tmp_path / "out", "windowed"))
    line = "is read beyond the 64 tokens the model was trained for: from there on it is no reference"
    assert status == 0
    assert " ".join(err.split()).count(line) == 1
    record = json.loads((tmp_path / "out" / "windowed.json").read_text())
    assert [note for note in record["notes"] if line in note] == record["notes"]
    assert " ".join(here("compare", tmp_path / "out")[1].split()).count(line) == 1
    assert here("report", tmp_path / "out")[0] == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert (report.count(line), report.count("(2 runs)")) == (1, 1)


def test_one_within_it_is_not(here, tmp_path):
    status, _, err = here(*_short(tmp_path / "model", tmp_path / "out", "windowed"), "--reference", "recompute")
    assert status == 0
    assert "no reference" not in err


def _short(path, out, experiment):
    """A run over all golden tokens of a model that was trained for 64."""
    if not path.exists():
        model = load_model(locate(ModelSource(golden_options("llama")[1], dtype="float32")))
        model.config.max_position_embeddings = 64
        model.save_pretrained(path)
    options = run(out, "--experiment", experiment, "--reference", "transformers", "--engine", "parallel")
    options[options.index("--model-name-or-path") + 1] = str(path)
    return options


def test_how_far_a_strategy_reaches(tmp_path):
    from tiny import plan, shared

    model = shared("llama")
    reached = {
        (name, positions): span(plan(model, name, 16, 4, positions))
        for name, positions in [
            *(("transformers", "text"), ("recompute", "text"), ("windowed", "text"), ("attention_sinks", "cache")),
            *(("attention_sinks", "text"), ("h2o", "text"), ("h2o", "cache")),
        ]
    }
    assert list(reached.values()) == [None, 16, 17, 17, None, None, 17]


def test_compare_and_report_give_its_statistics(folder, here):
    status, out, _ = here("compare", folder / "stepwise")
    assert status == 0
    shown = " ".join(out.split())
    for word in ("Divergence from the reference (nats)", "99.9 %", "largest", "same top", "RMS Δp", "ln ppl ratio"):
        assert word in shown
    here("report", folder / "stepwise")
    page = (folder / "stepwise" / "report.md").read_text()
    assert "Divergence from the reference (nats)" in page and "RMS Δp (%)" in page


def test_a_figure_of_it_is_logarithmic(folder, here):
    from sinkbench.results import figures

    assert here("plot", "--features", "kl", "--output-dir", folder / "stepwise")[0] == 0
    found = rows(folder / STEPWISE)
    (ax,) = figures.draw({"windowed": found, "transformers": rows(folder / ITSELF)}, ["kl"], skip_first=0).axes
    assert ax.get_yscale() == "log"
    assert "transformers" not in " ".join(line.get_label() for line in ax.lines)  # all of it is 0
    drawn = ax.lines[0].get_ydata()
    assert (drawn > 0).all() and drawn.max() <= ax.get_ylim()[1] < 2 * drawn.max()
    assert ax.get_ylim()[0] > drawn.max() * 1e-7  # what lies lower is rounding
    with pytest.raises(UserError, match="with --reference"):
        figures.draw({"transformers": rows(folder / ALONE)}, ["kl"], skip_first=0)


@pytest.mark.heavy
@engines
def test_of_the_embedded_model_it_is_that_of_full_logits_of_transformers(engine, here, tmp_path):
    window, n = 24, 40
    options = ("--experiment", "recompute", "--reference", "transformers", "--window-size", window)
    status, *_ = here("run", *options, "--num-tokens", n, "--engine", engine, "--output-dir", tmp_path)
    assert status == 0
    checkpoint = locate(ModelSource("smollm2-135m"))
    model = load_model(checkpoint)
    tokens = read_stream(Source("kjv"), n + 1, lambda: load_tokenizer(checkpoint)).tokens
    with torch.no_grad():
        p = model(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(-1)
        each = [model(input_ids=tokens[None, max(0, t + 1 - window) : t + 1]).logits[0, -1] for t in range(n)]
    q = torch.stack(each).double().log_softmax(-1)
    found = rows(tmp_path / "recompute.csv")
    assert found.kl.to_numpy() == pytest.approx((p.exp() * (p - q)).sum(-1).numpy(), abs=1e-4)
    assert found.kl.max() > 1
    assert list(found.same_top) == (p.argmax(-1) == q.argmax(-1)).int().tolist()
    assert found.reference_nll.to_numpy() == pytest.approx(-p.gather(1, tokens[1:, None])[:, 0].numpy(), abs=1e-4)
    assert len(found) == n != TOKENS
