"""Models and datasets of the Hub, loaded by the real command from a stand-in on this machine."""

import io
import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import GOLDEN
from hub import CUT, GATED, HANG, Hub, serving
from safetensors.torch import load, save

LLAMA = GOLDEN / "llama"
IDS = json.loads((LLAMA / "tokens.jsonl").read_text())["input_ids"]
# A process that carries out command lines as they come: what one of its own does, without the seconds of imports.
SHELL = """
import contextlib, io, json, sys, traceback
from sinkbench.cli import main
for line in sys.stdin:
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture(autouse=True)
def _healthy(hub):
    hub.faults.clear()
    hub.requests.clear()
    yield
    hub.faults.clear()


def surroundings(endpoint: str, home: Path) -> dict[str, str]:
    """Variables of a machine that knows no other Hub; a server's silence is one second."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub_variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    impatient = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return {**kept, **hub_variables, **impatient, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@contextmanager
def shelling(endpoint: str, home: Path, **environment: str):
    """The command, in a process that stays: arguments in; exit status, standard output and standard error out."""
    command, env = [sys.executable, "-c", SHELL], {**surroundings(endpoint, home), **environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:

        def call(*arguments):
            process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


@pytest.fixture(scope="module")
def shell(hub, home):
    with shelling(hub.url, home) as call:
        yield call


def process(hub, home, *arguments, **environment):
    """The command, in a process of its own."""
    env = {**surroundings(hub.url, home), **environment}
    command = [sys.executable, "-m", "sinkbench", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def parquet(rows: dict) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(rows).to_parquet(file)
    return file.getvalue()


def files(folder: Path = LLAMA, **changed: bytes) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".safetensors")} | changed


def model(hub: Hub, name: str, *refs: str, scale: float = 1.0) -> str:
    """The golden model, its output layer scaled."""
    weights = load((LLAMA / "model.safetensors").read_bytes())
    weights["lm_head.weight"] *= scale
    content = save(weights, metadata={"format": "pt"})
    return hub.commit("model", name, files() | {"model.safetensors": content}, *refs)


def dataset(hub: Hub, name: str, *refs: str, ids: list[int] = IDS) -> str:
    rows = {"README.md": b"# token ids\n", "data/test-00000-of-00001.parquet": parquet({"input_ids": [ids]})}
    return hub.commit("dataset", name, rows, *refs)


@pytest.fixture
def names(hub, request):
    """A model and a dataset that no other test has in its cache."""
    own = re.sub("[^a-z]+", "-", request.node.name)[-60:].strip("-")
    model(hub, f"models/{own}")
    dataset(hub, f"rows/{own}")
    return f"models/{own}", f"rows/{own}"


def line(names, out, *more):
    options = [*("--data-column", "input_ids", "--window-size", 32, "--num-tokens", 60), "--output-dir", out, *more]
    return ["run", "--model-name-or-path", names[0], "--dataset-name", names[1], *options]


LOCAL_IDS = ("--dataset-name", LLAMA / "tokens.jsonl")
LOCAL_MODEL = ("--model-name-or-path", LLAMA)


def nll(out: Path) -> list[float]:
    return list(pd.read_csv(out / "attention_sinks.csv").nll)


def record(out: Path) -> dict:
    return json.loads((out / "attention_sinks.json").read_text())


def succeeded(result):
    assert result[0] == 0, result[2]


def refused(result, out, *words):
    """Exit status 2, one line that says what to do, and nothing left behind."""
    status, _, error = result
    assert status == 2, error
    assert len(error.strip().splitlines()) == 1, error
    for word in words:
        assert word in error
    assert not list(Path(out).glob("*"))


# What works


def test_a_model_and_a_dataset_of_the_hub_give_the_golden_numbers_and_are_on_record(hub, home, names, tmp_path):
    succeeded(process(hub, home, *line(names, tmp_path), "--num-tokens", "300"))
    golden = pd.read_csv(LLAMA / "reference.csv").nll_attention_sinks
    assert nll(tmp_path) == pytest.approx(list(golden), abs=2e-4)
    assert record(tmp_path)["model"]["revision"] == hub.repositories["model", names[0]].refs["main"]
    assert record(tmp_path)["dataset"]["revision"] == hub.repositories["dataset", names[1]].refs["main"]


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


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# Offline


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


# Faults

FAULTS = {
    "gated": (GATED, ["gated", "ask for access", "hf auth login"]),
    "unauthorised": (401, ["ask for access", "hf auth login"]),
    "forbidden": (403, ["403", "ask for access", "hf auth login"]),
    "failing": (500, ["failed (500)", "try again later"]),
    "hanging": (HANG, ["no answer", "HF_ENDPOINT"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_refuses_fails_or_hangs_is_one_line_in_bounded_time(kind, fault, hub, shell, names, tmp_path):
    answer, words = FAULTS[fault]
    name = names[kind == "dataset"]
    hub.fail(name, answer)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    begin = time.monotonic()
    refused(shell(*line(names, tmp_path / "o", *other)), tmp_path / "o", name, *words)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("fault", ["gated", "forbidden", "failing", "hanging"])
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_so_is_one_that_does_it_only_when_files_are_asked_for(kind, fault, hub, shell, names, tmp_path):
    answer, words = FAULTS[fault]
    name = names[kind == "dataset"]
    hub.fail(f"{name}/resolve", answer)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    begin = time.monotonic()
    refused(shell(*line(names, tmp_path / "o", *other)), tmp_path / "o", name, *words)
    assert time.monotonic() - begin < 40


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
@pytest.mark.parametrize("pattern", ["GET .*safetensors", "GET .*parquet"])
def test_a_download_that_is_cut_for_good_is_one_line(pattern, streaming, hub, shell, names, tmp_path):
    hub.fail(pattern, CUT)
    refused(shell(*line(names, tmp_path / "o", streaming)), tmp_path / "o", "try again")


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


def test_a_server_that_is_not_there_is_one_line(home, tmp_path):
    with serving() as gone:
        endpoint = gone.url
    begin = time.monotonic()
    with shelling(endpoint, home) as nowhere:
        refused(nowhere(*line(("models/x", "rows/x"), tmp_path, *LOCAL_IDS)), tmp_path, "models/x", "no answer")
        refused(nowhere(*line(("models/x", "rows/x"), tmp_path, *LOCAL_MODEL)), tmp_path, "rows/x", "no answer")
    assert time.monotonic() - begin < 30


def test_an_endpoint_that_is_no_address_is_named(hub, home, tmp_path):
    result = process(hub, home, *line(("models/x", ""), tmp_path, *LOCAL_IDS), HF_ENDPOINT="nowhere")
    refused(result, tmp_path, "HF_ENDPOINT", "'nowhere'", "https://")


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_hub_that_hangs_is_given_up_within_half_a_minute_by_default(kind, hub, home, names, tmp_path):
    hub.fail(".", HANG)
    other = LOCAL_IDS if kind == "model" else LOCAL_MODEL
    usual = {"HF_HUB_ETAG_TIMEOUT": "10", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
    begin = time.monotonic()
    refused(process(hub, home, *line(names, tmp_path / "o", *other), **usual), tmp_path / "o", "no answer")
    assert time.monotonic() - begin < 40  # of which some go to imports


# Code


def remote_code(marker: Path) -> dict[str, bytes]:
    """A model whose class comes with it, and leaves a mark when it is imported."""
    code = f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(marker)!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
    config = json.loads((LLAMA / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": own}
    return files() | {"config.json": json.dumps(config).encode(), "own.py": code.encode()}


def test_code_of_a_model_runs_only_when_it_is_trusted(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    hub.commit("model", names[0], remote_code(marker))
    refused(shell(*line(names, out, *LOCAL_IDS)), out, names[0], "--trust-remote-code")
    assert not marker.exists()
    assert not hub.asked(r"GET .*own\.py")
    succeeded(shell(*line(names, out, *LOCAL_IDS, "--trust-remote-code")))
    assert marker.exists()
    succeeded(shell(*line(names, tmp_path / "l", *LOCAL_IDS, *LOCAL_MODEL)))
    assert nll(out) == pytest.approx(nll(tmp_path / "l"), abs=1e-5)


def test_code_of_a_tokenizer_runs_only_when_it_is_trusted(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    code = f"""
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({str(marker)!r}).touch()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
    content = tokenizer_files(tmp_path / "tokenizer")
    settings = json.loads(content["tokenizer_config.json"])
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    content |= {"tokenizer_config.json": json.dumps(settings).encode(), "own.py": code.encode()}
    hub.commit("model", names[0], files() | content)
    hub.commit("dataset", names[1], {"test.parquet": parquet({"input_ids": ["some text to read " * 10]})})
    refused(shell(*line(names, out)), out, "--trust-remote-code")
    assert not marker.exists()
    succeeded(shell(*line(names, out, "--trust-remote-code")))
    assert marker.exists()


@pytest.mark.parametrize("trust", [[], ["--trust-remote-code"]])
def test_a_datasets_loading_script_is_never_run(trust, hub, shell, names, tmp_path):
    marker, script = tmp_path / "ran", names[1].split("/")[1] + ".py"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n".encode()
    hub.commit("dataset", names[1], {"README.md": b"# scripted\n", script: code})
    out = tmp_path / "o"
    refused(shell(*line(names, out, *LOCAL_MODEL, *trust)), out, names[1], "script", "--dataset-revision")
    assert not marker.exists()


# Pickles


def pickled(value) -> dict[str, bytes]:
    file = io.BytesIO()
    torch.save(value, file)
    return {"config.json": files()["config.json"], "pytorch_model.bin": file.getvalue()}


def test_pickled_weights_are_read_only_when_asked_for_and_give_the_same_numbers(hub, shell, names, tmp_path):
    out = tmp_path / "o"
    hub.commit("model", names[0], pickled(load((LLAMA / "model.safetensors").read_bytes())))
    refused(shell(*line(names, out, *LOCAL_IDS)), out, names[0], "--allow-pickle")
    assert not hub.asked(r"GET .*\.bin")
    succeeded(shell(*line(names, out, *LOCAL_IDS, "--allow-pickle")))
    succeeded(shell(*line(names, tmp_path / "l", *LOCAL_IDS, *LOCAL_MODEL)))
    assert nll(out) == pytest.approx(nll(tmp_path / "l"), abs=1e-5)
    assert not hub.asked("discussions|commits")  # nobody is asked to convert them


def test_safetensors_are_preferred_to_pickles(hub, shell, names, tmp_path):
    hub.commit("model", names[0], files() | {"pytorch_model.bin": b"never read"})
    for number, options in enumerate(([], ["--allow-pickle"])):
        succeeded(shell(*line(names, tmp_path / str(number), *LOCAL_IDS, *options)))
    assert not hub.asked(r"GET .*\.bin")


class Trap:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_program_in_a_pickle_is_not_run_even_then(hub, shell, names, tmp_path):
    marker, out = tmp_path / "ran", tmp_path / "o"
    hub.commit("model", names[0], pickled({"lm_head.weight": Trap(marker)}))
    refused(shell(*line(names, out, *LOCAL_IDS, "--allow-pickle")), out, names[0], "pickle", "safetensors")
    assert not marker.exists()
