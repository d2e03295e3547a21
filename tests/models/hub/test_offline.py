"""What was downloaded works without the Hub."""

import pytest
from hub import HANG
from hub_runs import (
    IDS,
    LOCAL_IDS,
    dataset,
    files,
    line,
    nll,
    parquet,
    record,
    refused,
    shelling,
    succeeded,
    tokenizer_files,
)

pytestmark = pytest.mark.heavy


def test_what_was_downloaded_whole_works_offline_at_the_revision_that_is_asked_for(hub, home, shell, names, tmp_path):
    dataset(hub, names[1], "v2", ids=IDS[::-1])
    for revision in ("main", "v2"):
        succeeded(shell(*line(names, tmp_path / revision, "--no-streaming", "--dataset-revision", revision)))
    hub.requests.clear()
    with shelling(hub.url, home, HF_HUB_OFFLINE="1") as offline:
        whole, out = ["--no-streaming", "--dataset-revision"], tmp_path / "refused"
        succeeded(offline(*line(names, tmp_path / "again", *whole, "main")))  # which is not the latest that is kept
        refused(offline(*line(names, out)), out, "--no-streaming")
        refused(offline(*line(names, out, *whole, "v3")), out, "v3", "HF_HUB_OFFLINE")
        refused(offline(*line(("models/other", names[1]), out, *LOCAL_IDS)), out, "models/other", "HF_HUB_OFFLINE")
    assert hub.requests == []
    assert record(tmp_path / "again")["dataset"]["sha256"] == record(tmp_path / "main")["dataset"]["sha256"]
    assert nll(tmp_path / "again") == nll(tmp_path / "main")


def test_a_hub_that_is_down_is_no_obstacle_to_what_is_in_the_cache(hub, shell, names, tmp_path):
    hub.commit("model", names[0], files() | tokenizer_files(tmp_path / "tokenizer"))
    hub.commit("dataset", names[1], {"test.parquet": parquet({"text": ["a text that is kept on disk " * 5]})})
    options = ["--data-column", "text", "--no-streaming"]
    succeeded(shell(*line(names, tmp_path / "up", *options)))
    for number, fault in enumerate((503, HANG)):
        hub.faults[:] = [(".", fault)]
        succeeded(shell(*line(names, tmp_path / str(number), *options)))
        assert record(tmp_path / str(number))["model"] == record(tmp_path / "up")["model"]
        assert nll(tmp_path / str(number)) == nll(tmp_path / "up")
    refused(shell(*line(names, tmp_path / "o", "--data-column", "text")), tmp_path / "o", "--no-streaming")
