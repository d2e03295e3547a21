"""Whatever a command is doing, SIGINT and SIGTERM end it: with their status, on record, and with no traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import tiny
from processes import begun, ended, size, stream_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkbench import signals
from sinkbench.models import loading
from sinkbench.results import reading
from sinkbench.signals import ENDING, Interrupted, check, undisturbed

ENDLESS = 200_000  # tokens
LISTENING = 20.0  # seconds in which a process has come so far that it handles signals
OURS = re.compile(r"(\S+: )?interrupted \(SIG(INT|TERM)\)|NLL with fresh context: |KV cache: |rows: ")  # our own lines


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    words = {f"w{i}": i for i in range(tiny.VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="w0", bos_token="w1", eos_token="w2")
    made.save_pretrained(where)
    tiny.ROTARY["llama"]().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{3 + i * 7 % 250}" for i in range(ENDLESS)))
    return path


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """Runs to be reported."""
    out = tmp_path_factory.mktemp("results")
    stream = stream_of(out.parent / "short.jsonl", 600)
    stream.write_text(json.dumps({"input_ids": [3 + i * 7 % 250 for i in range(600)]}))
    for strategy in ("attention_sinks", "windowed", "transformers"):
        options = {"model": model, "dataset": stream, "strategy": strategy, "out": out}
        line = "run --model-name-or-path {model} --dataset-name {dataset} --data-column input_ids --window-size 32"
        line += " --num-tokens 500 --engine parallel --experiment {strategy} --output-dir {out}"
        assert ended(begun(line.format(**options).split())) == 0
    return out


@pytest.fixture
def commands(model, text, results, tmp_path):
    """Command lines, of which all but the last write to the folder ``out`` without end."""
    out = tmp_path / "out"
    file = tmp_path / "sweep.toml"
    file.write_text(
        f'model_name_or_path = "{model}"\ndataset_name = "{text}"\ndata_column = "text"\nnum_tokens = {ENDLESS - 100}\n'
        f'experiment = ["attention_sinks", "windowed"]\nwindow_size = [16, 32]\noutput_dir = "{out}"\n'
    )
    to = ["--model-name-or-path", model, "--window-size", 32, "--output-dir", out]
    stream = ["--dataset-name", text, "--data-column", "text", "--num-tokens", ENDLESS - 100]
    return {
        "run": ["run", *to, *stream],
        "sweep": ["sweep", file],
        "generate": ["generate", *to, "--prompt", "w9 w17", "--max-new-tokens", ENDLESS],
        "report": ["report", results, "--output", tmp_path / "report.html"],
    }


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.fixture
def at_work(known, commands, tmp_path):
    """By command, seconds until it has imported and loaded all that it needs, and is at work for a while."""

    def seconds(command):
        if command not in known:
            process, begin = Process(commands[command]), time.monotonic()
            process.listens()
            while process.popen.poll() is None and not any(size(p) > 3000 for p in tmp_path.glob("out/*.csv")):
                time.sleep(0.01)
            known[command] = 1.2 * (time.monotonic() - begin)
            process.popen.kill()
            process.ended()
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return known[command]

    return seconds


# One signal, at a place that is known


@pytest.mark.parametrize("number", ENDING)
def test_a_raise_that_a_finalizer_swallows_ends_the_command_all_the_same(number, here, commands, tmp_path, monkeypatch):
    """The signal comes while Python carries out a ``__del__``, out of which nothing can be raised."""
    lines = []

    class Freed:
        def __del__(self):
            lines.append("before the raise")
            os.kill(os.getpid(), number)
            lines.append("behind it")

    real = loading.load_tokenizer

    def load(checkpoint):
        freed = Freed()
        del freed
        lines.append("it was lost")
        return real(checkpoint)

    monkeypatch.setattr("sinkbench.runs.run.load_tokenizer", load)
    status, _, error = here(*commands["run"])
    assert lines == ["before the raise", "it was lost"]
    assert (status, error) == (128 + number, "")
    record = json.loads((tmp_path / "out" / "attention_sinks.json").read_text())
    assert record["exit_reason"] == f"interrupted ({signal.Signals(number).name})"
    assert not (tmp_path / "out" / "attention_sinks.csv").exists()


def test_what_is_lost_is_raised_again_where_there_is_no_stage_to_come():
    class Freed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    def work():
        freed = Freed()
        del freed
        time.sleep(30)

    begin = time.monotonic()
    with signals.signals() as watch:
        error = watch.attempt(work)
    assert isinstance(error, Interrupted)
    assert 1 < time.monotonic() - begin < 10
    time.sleep(0.2)  # no signal comes behind it, which would end this process


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize(
    "line",
    [
        ("report", "{results}", "--output", "{out}/report.html"),
        ("plot", "--output-dir", "{results}", "--output", "{out}/figure.png"),
        ("compare", "{results}"),
    ],
    ids=lambda line: line[0],
)
def test_commands_without_steps_end_too(line, number, here, results, tmp_path, monkeypatch):
    swallowed = []

    def parse(*about):
        try:
            os.kill(os.getpid(), number)
            time.sleep(0)  # here at the latest it is raised
        except Interrupted:
            swallowed.append(True)
        return real(*about)

    real = reading.parse
    monkeypatch.setattr(reading, "parse", parse)
    status, out, error = here(*(word.format(results=results, out=tmp_path) for word in line))
    assert (status, out, error) == (128 + number, "", "")
    assert swallowed == [True]  # the next file was not read
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_at_the_very_end_is_the_status_too(here, results, tmp_path, monkeypatch):
    monkeypatch.setattr("typer.echo", lambda text: os.kill(os.getpid(), signal.SIGTERM))
    assert here("report", results, "--output", tmp_path / "report.html")[0] == 143


def test_what_must_not_be_cut_is_not_and_what_follows_is():
    done = []
    with signals.signals() as watch:

        def work():
            with undisturbed():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)
                check()
                done.append("whole")
            done.append("cut")

        error = watch.attempt(work)
        os.kill(os.getpid(), signal.SIGINT)  # while it closes
        time.sleep(0)
        check()
    assert (done, error.args) == (["whole"], (signal.SIGTERM,))


def test_of_several_signals_the_first_is_the_reason_and_none_disturbs_the_end(here, commands, tmp_path, monkeypatch):
    from sinkbench.runs import run as runs

    def strike(*numbers):
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0)

    close = runs.close

    def closing(*about):
        strike(signal.SIGINT, signal.SIGTERM, signal.SIGINT)
        close(*about)
        strike(signal.SIGINT, signal.SIGTERM)

    monkeypatch.setattr(runs, "close", closing)
    monkeypatch.setattr(runs, "_check_vocabulary", lambda *about: strike(signal.SIGTERM, signal.SIGINT))
    status, _, error = here(*commands["run"])
    assert (status, error) == (143, "")
    record = json.loads((tmp_path / "out" / "attention_sinks.json").read_text())
    assert (record["exit_reason"], record["rows"]) == ("interrupted (SIGTERM)", 0)


def test_a_library_cannot_have_signals_handled_in_its_own_way():
    with signals.signals() as watch:
        with signals.kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)
        assert watch.came == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# Signals at any moment, to processes of their own


class Process:
    """The installed command, in a process of its own."""

    def __init__(self, line):
        command = [sys.executable, "-m", "sinkbench", *map(str, line)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def listens(self):
        """Wait until it handles signals: before, the interpreter itself is starting."""
        deadline = time.monotonic() + LISTENING
        while time.monotonic() < deadline and self.popen.poll() is None:
            about = Path(f"/proc/{self.popen.pid}/status").read_text()
            caught = int(about.partition("SigCgt:")[2].split()[0], 16)
            if caught >> (signal.SIGTERM - 1) & 1:
                return
            time.sleep(0.001)
        raise AssertionError("it does not handle signals")

    def send(self, number):
        self.popen.send_signal(number)

    def ended(self):
        """Status, standard error, and seconds until then."""
        begin = time.monotonic()
        try:
            _, error = self.popen.communicate(timeout=60)
        finally:
            self.popen.kill()
        return self.popen.returncode, error, time.monotonic() - begin


def orderly(folder, status):
    """Every record in ``folder`` says that a signal of this status ended it, or that it was not; rows are whole."""
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        assert record["exit_reason"] == f"interrupted ({signal.Signals(status - 128).name})", path
        csv = path.with_suffix(".csv")
        frame = pd.read_csv(csv) if csv.exists() else []
        assert len(frame) == record["rows"]
        assert not csv.exists() or csv.read_bytes().endswith(b"\n")
    names = {path.name for path in folder.glob("*")}
    assert not {name for name in names if name.endswith(".part")}
    assert {name[:-4] for name in names if name.endswith(".csv")} <= {n[:-5] for n in names if n.endswith(".json")}


def struck(line, folder, blows):
    """Carry out ``line``; send ``blows``, pairs of seconds to wait and a signal. ``None`` if it had ended before."""
    process = Process(line)
    process.listens()
    sent = []
    for seconds, number in blows:
        time.sleep(seconds)
        if process.popen.poll() is None:
            process.send(number)
            sent.append(number)
    status, error, seconds = process.ended()
    if not sent or (status == 0 and line[0] == "report" and seconds < 0.3):
        return None  # it was gone, or just about to go
    assert status - 128 in sent, error
    assert all(map(OURS.match, error.splitlines())), error
    assert seconds < 15  # two, and what a busy machine takes to import a stage
    if folder.exists():
        orderly(folder, status)
    return seconds


@pytest.mark.parametrize("number", ENDING)
def test_within_the_first_moments_the_process_ends_at_once_and_silently(number, commands, chance):
    for _ in range(2):
        process = Process(commands["report"])
        process.listens()
        time.sleep(chance.uniform(0, 0.25))
        process.send(number)
        assert process.ended()[:2] == (128 + number, "")


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("left", ["atexit.register(strike)", "threading.Thread(target=lambda: time.sleep(30)).start()"])
def test_so_it_does_when_the_work_is_done_and_the_interpreter_takes_its_leave(number, left):
    """While it calls what libraries have registered, and while it waits for their threads."""
    program = f"""
import atexit, os, threading, time
import sinkbench.__main__, sinkbench.cli

def strike():
    os.kill(os.getpid(), {int(number)})

def command():
    print("done")
    {left}
    threading.Timer(0.3, strike).start()

sinkbench.cli.main = command
sinkbench.__main__.main()
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = [sys.executable, "-c", program]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False, env=env)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, "done\n", "")


@pytest.mark.heavy
@pytest.mark.parametrize("round_", range(10))
@pytest.mark.parametrize("command", ["run", "sweep", "generate", "report"])
def test_at_any_moment_one_signal_ends_a_command(command, round_, commands, tmp_path, chance, at_work):
    for tried in range(10):
        blow = chance.uniform(0, at_work(command) / (1 + tried / 2)), chance.choice(ENDING)
        print(blow)
        if struck(commands[command], tmp_path / "out", [blow]) is not None:
            return
    raise AssertionError("it ends too soon")


@pytest.mark.heavy
@pytest.mark.parametrize("round_", range(5))
@pytest.mark.parametrize("command", ["run", "sweep", "generate", "report"])
def test_at_any_moment_so_do_several(command, round_, commands, tmp_path, chance, at_work):
    for tried in range(10):
        first = chance.uniform(0, at_work(command) / (1 + tried / 2)), chance.choice(ENDING)
        gap = chance.choice([0.0, 0.02, 0.3, 1.1])
        more = [(chance.uniform(0, gap), chance.choice(ENDING)) for _ in range(chance.randrange(1, 5))]
        print(first, more)
        if struck(commands[command], tmp_path / "out", [first, *more]) is not None:
            return
    raise AssertionError("it ends too soon")
