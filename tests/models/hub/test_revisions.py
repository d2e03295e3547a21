"""Models and datasets of the Hub: the golden numbers, and the commit that they come from."""

import pandas as pd
import pytest
from hub_runs import (
    IDS,
    LLAMA,
    LOCAL_IDS,
    LOCAL_MODEL,
    dataset,
    files,
    line,
    model,
    nll,
    parquet,
    record,
    succeeded,
    tokenizer_files,
)


def test_a_model_and_a_dataset_of_the_hub_give_the_golden_numbers_and_are_on_record(hub, shell, names, tmp_path):
    succeeded(shell(*line(names, tmp_path), "--num-tokens", "300"))
    golden = pd.read_csv(LLAMA / "reference.csv").nll_attention_sinks
    assert nll(tmp_path) == pytest.approx(list(golden), abs=2e-4)
    assert record(tmp_path)["model"]["revision"] == hub.repositories["model", names[0]].refs["main"]
    assert record(tmp_path)["dataset"]["revision"] == hub.repositories["dataset", names[1]].refs["main"]


@pytest.mark.heavy
def test_a_sweep_runs_from_the_hub_and_knows_its_results_by_the_commit(hub, shell, names, tmp_path):
    file, out = tmp_path / "sweep.toml", tmp_path / "out"
    file.write_text(
        f'model_name_or_path = "{names[0]}"\ndataset_name = "{names[1]}"\ndata_column = "input_ids"\n'
        f'experiment = ["windowed", "attention_sinks"]\nwindow_size = 32\nnum_tokens = 60\noutput_dir = "{out}"\n'
    )
    succeeded(shell("sweep", file))
    first = nll(out)
    assert shell("sweep", file)[1].count("was there") == 2
    model(hub, names[0], scale=3.0)  # the branch moves on: these are other weights
    status, shown, _ = shell("sweep", file, "--overwrite")
    assert (status, "was there" in shown) == (0, False)
    assert nll(out) != first


@pytest.mark.parametrize("how", ["branch", "tag", "commit"])
def test_a_model_is_pinned_by_branch_tag_or_commit(how, hub, shell, names, tmp_path):
    name = names[0]
    main = hub.repositories["model", name].refs["main"]
    other = model(hub, name, "next", "v2", scale=1.5)
    wanted = {"branch": "next", "tag": "v2", "commit": other}[how]
    succeeded(shell(*line(names, tmp_path / "main", *LOCAL_IDS)))
    succeeded(shell(*line(names, tmp_path / "other", *LOCAL_IDS, "--revision", wanted)))
    assert (record(tmp_path / "main")["model"]["revision"], record(tmp_path / "other")["model"]["revision"]) == (
        main,
        other,
    )
    assert nll(tmp_path / "main") != pytest.approx(nll(tmp_path / "other"), rel=1e-2)


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
@pytest.mark.parametrize("how", ["branch", "tag", "commit"])
def test_a_dataset_is_pinned_by_branch_tag_or_commit(how, streaming, hub, shell, names, tmp_path):
    other = dataset(hub, names[1], "next", "v2", ids=IDS[::-1])
    wanted = {"branch": "next", "tag": "v2", "commit": other}[how]
    succeeded(shell(*line(names, tmp_path / "main", *LOCAL_MODEL, streaming)))
    succeeded(shell(*line(names, tmp_path / "other", *LOCAL_MODEL, streaming, "--dataset-revision", wanted)))
    assert list(pd.read_csv(tmp_path / "main/attention_sinks.csv").token) == IDS[1:61]
    assert list(pd.read_csv(tmp_path / "other/attention_sinks.csv").token) == IDS[::-1][1:61]


def test_a_branch_that_has_moved_is_followed(hub, shell, names, tmp_path):
    succeeded(shell(*line(names, tmp_path / "before", *LOCAL_IDS)))
    moved = model(hub, names[0], "main", scale=1.5)
    succeeded(shell(*line(names, tmp_path / "after", *LOCAL_IDS)))
    assert record(tmp_path / "after")["model"]["revision"] == moved
    assert nll(tmp_path / "before") != nll(tmp_path / "after")


def test_every_file_is_asked_for_at_the_one_commit_that_is_on_record(hub, shell, names, tmp_path):
    succeeded(shell(*line(names, tmp_path)))
    asked = hub.asked(r"/resolve/")
    assert asked
    assert not [request for request in asked if "/resolve/main/" in request]


def test_text_is_tokenised_by_the_models_own_tokenizer_streaming_and_not(hub, shell, names, tmp_path):
    hub.commit("model", names[0], files() | tokenizer_files(tmp_path / "tokenizer"))
    text = "In the beginning was the word, and the word was short. " * 5
    hub.commit("dataset", names[1], {"train.parquet": parquet({"text": [text, "never read"]})})
    options = ["--data-column", "text", "--split", "train"]
    succeeded(shell(*line(names, tmp_path / "s", *options, "--streaming")))
    succeeded(shell(*line(names, tmp_path / "n", *options, "--no-streaming")))
    tokens = [list(pd.read_csv(tmp_path / how / "attention_sinks.csv").token) for how in "sn"]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 60
