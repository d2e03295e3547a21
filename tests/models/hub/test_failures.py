"""A Hub that refuses, fails, hangs or cuts a download is one line in bounded time."""

import time

import pytest
from hub import CUT, GATED, HANG, serving
from hub_runs import LOCAL_IDS, LOCAL_MODEL, line, nll, process, refused, shelling, succeeded

FAULTS = {
    "gated": (GATED, ["gated", "ask for access", "hf auth login"]),
    "unauthorised": (401, ["ask for access", "hf auth login"]),
    "forbidden": (403, ["403", "ask for access", "hf auth login"]),
    "failing": (500, ["failed (500)", "try again later"]),
    "hanging": (HANG, ["no answer", "HF_ENDPOINT"]),
}

heavy = pytest.mark.heavy
# what waits for a server, or tries again, takes seconds
faults = pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=heavy if name in ("failing", "hanging") else ()) for name in FAULTS]
)


@faults
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_refuses_fails_or_hangs_is_one_line_in_bounded_time(kind, fault, hub, shell, names, tmp_path):
    answer, words = FAULTS[fault]
    name = names[kind == "dataset"]
    hub.fail(name, answer)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    begin = time.monotonic()
    refused(shell(*line(names, tmp_path / "o", *other)), tmp_path / "o", name, *words)
    assert time.monotonic() - begin < 10


@faults
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_so_is_one_that_does_it_only_when_files_are_asked_for(kind, fault, hub, shell, names, tmp_path):
    answer, words = FAULTS[fault]
    name = names[kind == "dataset"]
    hub.fail(f"{name}/resolve", answer)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    begin = time.monotonic()
    refused(shell(*line(names, tmp_path / "o", *other)), tmp_path / "o", name, *words)
    assert time.monotonic() - begin < 40


@heavy
@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
@pytest.mark.parametrize("pattern", ["GET .*safetensors", "GET .*parquet"])
def test_a_download_that_is_cut_for_good_is_one_line(pattern, streaming, hub, shell, names, tmp_path):
    hub.fail(pattern, CUT)
    refused(shell(*line(names, tmp_path / "o", streaming)), tmp_path / "o", "try again")


@heavy
def test_a_download_that_is_cut_is_whole_the_next_time(hub, shell, names, tmp_path):
    hub.fail("GET .*safetensors", CUT)
    assert shell(*line(names, tmp_path / "o", *LOCAL_IDS))[0] == 2
    hub.faults.clear()
    succeeded(shell(*line(names, tmp_path / "o", *LOCAL_IDS)))
    succeeded(shell(*line(names, tmp_path / "l", *LOCAL_IDS, *LOCAL_MODEL)))
    assert nll(tmp_path / "o") == nll(tmp_path / "l")


def test_an_unknown_model_dataset_or_revision_is_named(hub, shell, names, tmp_path):
    out = tmp_path / "o"
    refused(shell(*line(("models/none", names[1]), out)), out, "no model 'models/none'", "check the name")
    refused(shell(*line((names[0], "rows/none"), out)), out, "no dataset 'rows/none'", "check the name")
    refused(shell(*line(names, out, "--revision", "v9")), out, names[0], "'v9'", "--revision")
    refused(shell(*line(names, out, "--dataset-revision", "v9")), out, names[1], "'v9'", "--dataset-revision")
    refused(shell(*line(names, out, "--revision", "0" * 40)), out, names[0], "--revision")
    refused(shell(*line(("a/b/c", names[1]), out, *LOCAL_IDS)), out, "a/b/c", "owner/name")
    refused(shell(*line(names, out, "--split", "dev")), out, "dev", "test")
    refused(shell(*line(names, out, "--task", "german")), out, "german", "--task")


@heavy
def test_a_server_that_is_not_there_is_one_line(home, tmp_path):
    with serving() as gone:
        endpoint = gone.url
    begin = time.monotonic()
    with shelling(endpoint, home) as nowhere:
        refused(nowhere(*line(("models/x", "rows/x"), tmp_path, *LOCAL_IDS)), tmp_path, "models/x", "no answer")
        refused(nowhere(*line(("models/x", "rows/x"), tmp_path, *LOCAL_MODEL)), tmp_path, "rows/x", "no answer")
    assert time.monotonic() - begin < 30


@heavy
def test_an_endpoint_that_is_no_address_is_named(hub, home, tmp_path):
    result = process(hub, home, *line(("models/x", ""), tmp_path, *LOCAL_IDS), HF_ENDPOINT="nowhere")
    refused(result, tmp_path, "HF_ENDPOINT", "'nowhere'", "https://")


@heavy
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_hangs_is_given_up_within_half_a_minute_by_default(kind, hub, home, names, tmp_path):
    hub.fail(".", HANG)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    usual = {"HF_HUB_ETAG_TIMEOUT": "10", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
    begin = time.monotonic()
    refused(process(hub, home, *line(names, tmp_path / "o", *other), **usual), tmp_path / "o", "no answer")
    assert time.monotonic() - begin < 40  # of which some go to imports
