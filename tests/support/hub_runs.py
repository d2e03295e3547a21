"""The command against the stand-in for the Hub: what it is given, what it wrote, how it refused."""

import io
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from golden import GOLDEN
from hub import Hub
from safetensors.torch import load, save

LLAMA = GOLDEN / "llama"
IDS = json.loads((LLAMA / "tokens.jsonl").read_text())["input_ids"]
# A process that carries out command lines as they come: what one of its own does, without the seconds of imports.
SHELL = """
import contextlib, io, json, sys, traceback
import datasets, transformers, sinkbench.runs.run
from sinkbench.cli import main
print("ready", flush=True)
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


def surroundings(endpoint: str, home: Path) -> dict[str, str]:
    """Variables of a machine that knows no other Hub; a server's silence is one second."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub_variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    impatient = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    return {**kept, **hub_variables, **impatient, "OMP_NUM_THREADS": "1"}


@contextmanager
def shelling(endpoint: str, home: Path, **environment: str):
    """The command, in a process that stays: arguments in; exit status, standard output and standard error out."""
    command, env = [sys.executable, "-c", SHELL], {**surroundings(endpoint, home), **environment}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "ready\n"

        def call(*arguments):
            process.stdin.write(json.dumps([str(a) for a in arguments]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


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


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bytewise).save_pretrained(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}
