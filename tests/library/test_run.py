"""``sinkbench.run``: the command line's options as keywords, with its defaults, its numbers and its sentences."""

import inspect
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pytest
import torch
from golden import golden_options

import sinkbench
from sinkbench.config import Option, RunConfig, configured, flag, options_of
from sinkbench.library.asking import described, signature
from sinkbench.results.reading import read_run
from sinkbench.validation import Count

from .conftest import FOLDER, NAMED


class More(RunConfig):
    """The options of ``run``, and one that is declared here and nowhere else."""

    patience: Annotated[Count, Option("N", "How long to wait.", "Output", decides=True)] = 7


def test_its_keywords_are_the_options_of_the_command_line_with_their_defaults() -> None:
    found = inspect.signature(sinkbench.run).parameters
    for name in options_of(RunConfig):
        assert found[name].default == getattr(RunConfig(), name)
        assert f"{name}: {options_of(RunConfig)[name].help}" in (sinkbench.run.__doc__ or "")
    assert set(found) - set(options_of(RunConfig)) == {"tokenizer", "config", "progress"}


def test_an_option_that_is_declared_is_a_keyword_by_that() -> None:
    assert signature(More, []).parameters["patience"].default == 7
    assert "patience: How long to wait." in described(More)


def test_rows_record_and_key_are_those_of_the_command_line(run, here, tmp_path: Path) -> None:
    ours = run(output_dir=tmp_path / "ours", attention_sink_size=4, dtype="float32")
    assert here("run", *golden_options("llama"), "--num-tokens", 60, "--output-dir", tmp_path / "line")[0] == 0
    theirs = read_run(tmp_path / "line" / "attention_sinks.csv")
    steady = ["input_length", "nll", "ppl", "overall_ppl", "kv_cache_bytes", "token"]
    pd.testing.assert_frame_equal(ours.frame[steady], theirs.frame[steady])
    assert ours.record["key"] == theirs.record["key"]
    assert ours.record["command"][0].startswith("sinkbench.run(model_name_or_path=")
    assert "objects" not in ours.record


def test_a_run_says_what_came_of_it(run, tmp_path: Path) -> None:
    done = run()
    assert done.exit_reason == "finished"
    assert len(done.frame) == done.length == done.record["rows"] == 60
    assert done.perplexity == pytest.approx(np.exp(done.frame.nll.mean()))
    assert done.path == tmp_path / "attention_sinks.csv"
    assert repr(done) == f"<run attention_sinks: 60 tokens, perplexity {done.perplexity:.4f}, finished, {done.path}>"
    assert f"<td>{done.perplexity:.4f}</td>" in done._repr_html_()


def test_nothing_is_printed(run, capfd) -> None:
    run()
    assert capfd.readouterr() == ("", "")


WRONG = ["", 0, -1, "nope", 1.5, {}, None, b"x"]


@pytest.mark.parametrize("name", options_of(RunConfig))
def test_a_bad_value_is_refused_in_the_sentence_of_the_command_line(name: str, tmp_path: Path) -> None:
    refused = 0
    for value in WRONG:
        with suppress(sinkbench.UserError):
            configured(RunConfig, {name: value})
            continue
        with pytest.raises(sinkbench.UserError, match=f"^{flag(name)}[ :]"):
            sinkbench.run(**{"output_dir": tmp_path, name: value})
        refused += 1
    assert refused >= 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("engine", "paralel"),
        ("window_size", 0),
        ("experiment", "atention_sinks"),
        ("dtype", "float8"),
        ("kv_format", "q5"),
        ("positions", "nowhere"),
        ("model_name_or_path", "./nowhere"),
        ("dataset_name", "./nowhere"),
    ],
)
def test_it_is_the_line_that_the_command_says(option: str, value: Any, here, tmp_path: Path) -> None:
    status, _, line = here("run", flag(option), value, "--output-dir", tmp_path)
    with pytest.raises(sinkbench.UserError) as caught:
        sinkbench.run(**{option: value, "output_dir": tmp_path})
    said = line.strip().replace('"0"', "0")
    assert (status, said) == (2, f"sinkbench: {caught.value}")


@pytest.mark.parametrize(
    ("name", "meant"), [("windowsize", "window_size"), ("model", "model_name_or_path"), ("strategy", "experiment")]
)
def test_an_unknown_keyword_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    with pytest.raises(sinkbench.UserError, match=rf"^--{name} is not known; did you mean {meant}\?$"):
        sinkbench.run(**{name: 3})


def test_an_existing_result_is_not_replaced_unasked(run) -> None:
    run()
    with pytest.raises(sinkbench.UserError, match=r"already exists: give --overwrite"):
        run()
    assert run(overwrite=True).length == 60


def test_a_run_goes_on_and_gives_what_one_without_a_break_does(run, tmp_path: Path) -> None:
    run(num_tokens=25)
    assert run(resume=True).length == 60
    assert json.loads((tmp_path / "attention_sinks.json").read_text())["resumed_at"] == [25]


def test_numbers_of_numpy_and_types_of_torch_are_taken(run) -> None:
    done = run(window_size=np.int64(16), dtype=torch.float32, device_map=torch.device("cpu"), name="small")
    assert done.record["options"]["window_size"] == 16
    assert done.record["options"]["dtype"] == "float32"
    assert done.path is not None
    assert done.path.name == "small.csv"


def test_parameters_are_a_table_or_as_on_the_command_line(run) -> None:
    table = run(experiment="h2o", set={"recent": 8}, name="table")
    line = run(experiment="h2o", set=["recent=8"], name="line")
    assert table.record["key"] == line.record["key"]


def test_a_file_gives_what_the_call_does_not_say(run, tmp_path: Path) -> None:
    file = tmp_path / "options.toml"
    file.write_text("window-size = 16\npositions = 'text'\n")
    done = sinkbench.run(**NAMED, window_size=24, num_tokens=20, config=file, output_dir=tmp_path)
    assert (done.record["options"]["window_size"], done.record["options"]["positions"]) == (24, "text")
    with pytest.raises(sinkbench.UserError, match=r"no\.toml: cannot be read"):
        sinkbench.run(config=tmp_path / "no.toml")


def test_progress_is_shown_where_it_is_asked_for(run, capfd) -> None:
    done = run(progress=True)
    out, lines = capfd.readouterr()
    assert out == ""
    assert len(lines.splitlines()) == 10
    assert lines.splitlines()[-1].startswith("attention_sinks: 60/60  ")
    assert lines.splitlines()[-1].endswith(f" tok/s  ppl {done.perplexity:.2f}")


def test_folders_may_be_texts_or_paths(tmp_path: Path) -> None:
    options = {"data_column": "input_ids", "num_tokens": 5, "model_name_or_path": str(FOLDER)}
    data = FOLDER / "tokens.jsonl"
    first = sinkbench.run(**options, dataset_name=str(data), output_dir=str(tmp_path / "a"))
    second = sinkbench.run(**options, dataset_name=data, output_dir=tmp_path / "a" / "b")
    assert first.record["key"] == second.record["key"]
