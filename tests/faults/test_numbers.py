"""Numbers that are none: said at once, counted, warned of at the end, and never made into others."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from golden import GOLDEN
from hub_runs import tokenizer_files
from resuming import run
from safetensors.torch import load_file, save_file

from sinkbench.api.decoding import Session
from sinkbench.results.comparison import compare_runs
from sinkbench.results.files import json_text
from sinkbench.runs.writer import perplexity

ROWS = 120


@pytest.fixture
def overflowing(tmp_path):
    """A model of finite weights whose logits overflow at some tokens."""
    folder = shutil.copytree(GOLDEN / "llama", tmp_path / "overflowing")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][7] *= 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def line(model, out, *more):
    return [*run(out, *more), "--model-name-or-path", model]


def valid(path):
    """The JSON in a file, which has no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_perplexity_of_no_number_is_none():
    assert math.isnan(perplexity(math.nan))
    assert perplexity(1e300) == math.inf
    assert perplexity(0.0) == 1.0


def test_json_has_null_for_numbers_that_are_none():
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": np.float64("nan")}}
    assert json.loads(json_text(value)) == {"a": None, "b": [None, [1.5, None]], "c": {"d": None}}


@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_a_model_that_overflows_is_told_at_once_and_at_the_end(engine, overflowing, here, tmp_path):
    csv = tmp_path / "out" / "attention_sinks.csv"
    status, out, error = here(*line(overflowing, csv.parent, "--num-tokens", ROWS, "--engine", engine))
    frame = pd.read_csv(csv)
    wrong = int(frame.nll.isna().sum())
    assert status == 0
    assert 0 < wrong < ROWS
    first = int(frame.nll.isna().argmax()) + 1
    assert len(error.splitlines()) == 1
    assert f"the NLL of row {first} is nan" in error
    assert f"WARNING: {wrong} of {ROWS} NLLs are no numbers" in " ".join(out.split())
    assert frame.ppl.isna().equals(frame.nll.isna())
    assert frame.overall_ppl.notna().sum() == first - 1
    record = valid(csv.with_suffix(".json"))
    assert (record["overall_ppl"], record["rows_not_finite"], record["rows"]) == (None, wrong, ROWS)


@pytest.mark.parametrize("strategy", ["h2o", "tova", "keydiff", "transformers"])
def test_so_it_is_under_any_strategy(strategy, overflowing, here, tmp_path):
    more = ("--experiment", strategy, "--num-tokens", 60, "--window-size", 32)
    status, _, error = here(*line(overflowing, tmp_path, *more))
    assert (status, len(error.splitlines())) == (0, 1)
    assert "is nan" in error


def test_such_a_run_goes_on(overflowing, here, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert here(*line(overflowing, whole, "--num-tokens", ROWS))[0] == 0
    assert here(*line(overflowing, cut, "--num-tokens", ROWS // 2))[0] == 0
    status, _, error = here(*line(overflowing, cut, "--num-tokens", ROWS, "--resume"))
    assert status == 0, error
    ours, wanted = (pd.read_csv(folder / "attention_sinks.csv") for folder in (cut, whole))
    assert ours.nll.to_numpy() == pytest.approx(wanted.nll.to_numpy(), abs=2e-4, rel=1e-3, nan_ok=True)
    records = [valid(folder / "attention_sinks.json") for folder in (cut, whole)]
    assert records[0]["rows_not_finite"] == records[1]["rows_not_finite"]


def test_an_nll_that_was_made_none_is_damage_still(overflowing, here, tmp_path):
    csv = tmp_path / "attention_sinks.csv"
    assert here(*line(GOLDEN / "llama", tmp_path, "--num-tokens", 50))[0] == 0
    lines = csv.read_text().splitlines(keepends=True)
    cells = lines[20].split(",")
    lines[20] = ",".join([cells[0], "nan", "nan", *cells[3:]])
    csv.write_text("".join(lines))
    status, _, error = here(*line(GOLDEN / "llama", tmp_path, "--num-tokens", 80, "--resume"))
    assert (status, "line 21 is damaged" in error) == (2, True)


def test_a_sweep_counts_them_too_and_knows_them_again(overflowing, here, tmp_path):
    file = tmp_path / "sweep.toml"
    tokens = GOLDEN / "llama" / "tokens.jsonl"
    file.write_text(
        f'model_name_or_path = "{overflowing}"\ndataset_name = "{tokens}"\ndata_column = "input_ids"\n'
        f'num_tokens = 60\nwindow_size = 32\noutput_dir = "{tmp_path / "out"}"\ndtype = "float32"\n'
    )
    status, out, error = here("sweep", file)
    assert status == 0
    assert error.count("the NLL of row") == 1
    assert "NLLs are no numbers" in " ".join(out.split())
    status, out, error = here("sweep", file)
    assert (status, "was there: finished; WARNING" in error) == (0, True)


def test_what_shows_them_does_not_hide_them(overflowing, here, tmp_path):
    out = tmp_path / "out"
    for model, name in ((overflowing, "over"), (GOLDEN / "llama", "sound")):
        assert here(*line(model, out / name, "--num-tokens", 290))[0] == 0
        for suffix in (".csv", ".json"):
            shutil.copy(out / name / f"attention_sinks{suffix}", out / f"{name}{suffix}")
    status, table, _ = here("compare", out / "over.csv", out / "sound.csv")
    assert (status, "nan" in table, "fails from token" in table) == (0, True, True)
    assert here("report", out)[0] == 0
    page = (out / "report.md").read_text()
    assert "not a number" in page
    assert "NLLs of 290 are not a finite number" in page
    limits = ("--skip-first", 0, "--log-perplexity-limit", 0)
    status, _, error = here("plot", "--output-dir", out, "--features", "perplexity", *limits)
    assert (status, "over is not shown whole" in error) == (0, True)


def test_the_run_that_fails_is_the_one_without_numbers():
    places = np.arange(1, 601.0)
    sound = pd.DataFrame({"input_length": places, "nll": 2.0, "overall_ppl": math.exp(2)})
    broken = sound.assign(nll=np.where(places > 300, np.nan, 1.9))
    found = {run.name: run for run in compare_runs({"sound": sound, "broken": broken}, "sound")}
    assert (found["sound"].fails, found["broken"].breaks, found["broken"].diverges) == (False, 301, 301)
    assert math.isnan(found["broken"].perplexity.value)
    assert math.isnan(found["broken"].loss.value)


@pytest.fixture
def speaking(tmp_path):
    """Generates with a model of these weights; the folder of its results."""

    def call(here, change, *more):
        folder = shutil.copytree(GOLDEN / "llama", tmp_path / "speaking")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name, content in tokenizer_files(tmp_path / "tokenizer").items():
            (folder / name).write_bytes(content)
        options = ("--max-new-tokens", 200, "--prompt", "a b", "--output-dir", tmp_path / "out", "--dtype", "float32")
        return here("generate", "--model-name-or-path", folder, *options, *more), tmp_path / "out"

    return call


def test_a_text_that_cannot_go_on_is_one_line(here, speaking):
    (status, _, error), out = speaking(here, lambda weights: weights["lm_head.weight"].mul_(1e38))
    assert (status, error.count("\n"), "overflow" in error) == (2, 1, True)
    assert not list(out.iterdir())


def test_a_text_that_cannot_go_on_later_keeps_its_rows(here, speaking, monkeypatch):
    read, calls = Session.read, []

    def overflowing(session, tokens):
        calls.append(1)
        logits = read(session, tokens)
        return logits if len(calls) < 20 else logits * math.nan

    monkeypatch.setattr(Session, "read", overflowing)
    (status, _, error), out = speaking(here, lambda weights: None)
    assert (status, error.count("\n"), "overflow" in error) == (2, 1, True)
    assert len(pd.read_csv(out / "generate_attention_sinks.csv")) == 19
    record = valid(out / "generate_attention_sinks.json")
    assert (record["rows"], record["exit_reason"].startswith("failed: the model's numbers overflow")) == (19, True)
