"""An option is declared once: the command line, experiment files, records and keys follow from that."""

from typing import Annotated, Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from sinkbench.cli.options import configured, takes
from sinkbench.config import ChatConfig, GenerateConfig, Option, RunConfig, options_of
from sinkbench.errors import UserError
from sinkbench.runs.account import opening
from sinkbench.runs.key import identified
from sinkbench.strategies.registry import chosen_by
from sinkbench.sweeps.experiment import axes_of, listed
from sinkbench.validation import Count


class More(RunConfig):
    """The options of ``run``, and one that is declared here and nowhere else."""

    patience: Annotated[Count, Option("N", "How long to wait.", "Output", axis=True, decides=True)] = 7


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer(rich_markup_mode="rich")

    @takes(More)
    def wait(given: dict[str, Any]) -> None:
        typer.echo(repr(configured(More, given).patience))

    app.command()(wait)
    return app


def key_of(config: RunConfig) -> str:
    return identified(config, chosen_by(config), [torch.arange(3)], "sha256:0")["key"]


def test_it_is_an_option_of_the_command_line_with_its_help_and_default(command) -> None:
    shown = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "100"}).output
    assert "--patience" in shown
    assert "How long to wait." in shown
    assert "[default: 7]" in shown
    assert CliRunner().invoke(command, ["--patience", "9"]).output == "9\n"
    assert CliRunner().invoke(command, []).output == "7\n"


def test_what_is_wrong_with_it_is_one_line_that_names_it() -> None:
    with pytest.raises(UserError, match=r"^--patience must be an integer of at least 1 \(got 0\)$"):
        configured(More, {"patience": 0})


def test_it_is_a_key_of_experiment_files() -> None:
    assert "patience" in axes_of(More)
    assert listed(More)(patience=[1, 2]).patience == [1, 2]
    assert listed(More)().patience == [7]


def test_it_is_on_record_and_in_the_key() -> None:
    config = More(patience=8)
    assert opening(config, chosen_by(config))["options"]["patience"] == 8
    assert key_of(More()) == key_of(More(patience=7)) != key_of(config)


@pytest.mark.parametrize(
    "change", [{"cuda_graphs": False}, {"engine": "parallel"}, {"num_tokens": 9}, {"documents": True}, {"every": 2}]
)
def test_every_option_that_decides_a_number_is_in_the_key(change) -> None:
    assert key_of(RunConfig(**change)) != key_of(RunConfig())


def test_what_only_the_other_engine_looks_at_is_not() -> None:
    parallel = RunConfig(engine="parallel")
    assert key_of(RunConfig(chunk_size=5)) == key_of(RunConfig())
    assert key_of(parallel.but(chunk_size=5)) != key_of(parallel) == key_of(parallel.but(cuda_graphs=False))


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": "windowed"},
        {"window_size": 9},
        {"attention_sink_size": 3},
        {"positions": "text"},
        {"experiment": "random"},
        {"experiment": "random", "set": {"seed": 1}},
    ],
)
def test_so_is_everything_that_a_strategy_is_made_of(change) -> None:
    others = [{}, {"experiment": "random"}] if change != {"experiment": "random"} else [{}]
    assert all(key_of(RunConfig(**change)) != key_of(RunConfig(**other)) for other in others)


def test_random_weights_are_those_of_the_kind_of_device_that_draws_them(monkeypatch) -> None:
    drawn = RunConfig(random_weights=True, dtype="float32")
    here, plain = key_of(drawn), key_of(RunConfig(dtype="float32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert key_of(drawn) != here == key_of(drawn.but(device_map="cpu"))
    assert key_of(RunConfig(dtype="float32")) == plain


def test_what_is_only_written_elsewhere_or_again_is_not() -> None:
    for change in ({"output_dir": "x"}, {"overwrite": True}, {"resume": True}, {"name": "x"}):
        assert key_of(RunConfig(**change)) == key_of(RunConfig())


@pytest.mark.parametrize("config", [RunConfig, GenerateConfig, ChatConfig])
def test_every_field_but_the_name_of_files_and_objects_of_a_program_is_an_option_with_a_sentence(config) -> None:
    assert set(config.model_fields) - set(options_of(config)) <= {"name", "objects"}
    assert all(option.help.endswith((".", "GPU.")) for option in options_of(config).values())
