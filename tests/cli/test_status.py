"""A process says what ended its work."""

import os
import signal

import pytest
from golden import GOLDEN, golden_options

from sinkbench.cli.status import status_of
from sinkbench.models import loading


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("finished", 0),
        ("dataset ended", 0),
        ("out of memory", 0),
        ("interrupted (SIGINT)", 130),
        ("interrupted (SIGTERM)", 143),
    ],
)
def test_the_status_is_that_of_the_signal(reason, status):
    assert status_of(reason) == status


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["run", "sweep", "generate", "chat"])
def test_so_it_is_while_a_model_is_being_loaded(command, number, status, here, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_arguments", lambda source: os.kill(os.getpid(), number))
    file = tmp_path / "x.toml"
    file.write_text(f'model_name_or_path = "{GOLDEN / "llama"}"\noutput_dir = "{tmp_path / "out"}"\n')
    model = ("--model-name-or-path", GOLDEN / "llama")
    line = {
        "run": (*golden_options("llama"), "--output-dir", tmp_path / "out"),
        "sweep": (file,),
        "generate": (*model, "--output-dir", tmp_path / "out"),
        "chat": model,
    }[command]
    found, _, error = here(command, *line)
    assert (found, error) == (status, "")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert not list(tmp_path.rglob("*.csv"))


def test_strategies_are_listed_at_80_columns(sinkbench):
    shown = sinkbench("strategies")
    assert shown.returncode == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for name in ("attention_sinks", "pyramid", "h2o", "random"):
        assert name in shown.stdout
    assert "beta=20" in shown.stdout
