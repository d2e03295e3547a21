"""Models, tokenizers, datasets and strategies as objects, where the command line has names."""

import copy
import json
from contextlib import suppress
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from tiny import FEW, STREAMABLE, build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, PreTrainedTokenizerFast

import sinkbench
from sinkbench.models.given import fingerprint
from sinkbench.strategies import Eviction, Held, Policy, Strategy
from sinkbench.strategies.h2o import H2O

from .conftest import FOLDER

IDS = json.loads((FOLDER / "tokens.jsonl").read_text())["input_ids"]
SMALL = [token % 256 for token in IDS]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of one letter."""
    model = Tokenizer(WordLevel({letter: number for number, letter in enumerate("abcdefgh")}, unk_token="a"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model)


class Newest(Strategy):
    """Keeps the newest tokens."""

    def policy(self, window: int, layer: int = 0, layers: int = 1) -> Policy:
        return Policy(window)


class Loudest(Eviction):
    """Keeps the entries with the longest keys."""

    def score(self, held: Held) -> torch.Tensor:
        return held.keys.norm(dim=-1)


def in_no_file() -> type[Strategy]:
    """A strategy as a notebook has it."""
    names: dict[str, Any] = {"Strategy": Strategy, "Policy": Policy, "__name__": "__main__"}
    exec(
        "class Mine(Strategy):\n    def policy(self, window, layer=0, layers=1):\n        return Policy(window)", names
    )
    return names["Mine"]


# Models


def test_a_model_at_hand_gives_what_its_folder_gives(run, llama) -> None:
    named, given = run(name="named"), run(model_name_or_path=llama, name="given")
    assert list(given.frame.nll) == list(named.frame.nll)
    assert given.record["objects"] == ["model"]
    assert given.record["model"]["class"] == "LlamaForCausalLM"
    assert given.record["determined_by"]["weights"].startswith("object sha256:")


def test_a_model_that_is_trained_is_measured_without_dropout_and_trained_on(run) -> None:
    model = build("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5)
    wanted = run(model_name_or_path=model, dataset_name=SMALL, name="before").frame.nll
    model.train()
    model.gpt_neox.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert list(run(model_name_or_path=model, dataset_name=SMALL, name="after").frame.nll) == list(wanted)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_model_whose_attention_caps_its_logits_computes_them_and_is_left_as_it_was(run, tmp_path) -> None:
    model = build("gemma2", attn="sdpa", head_dim=16, num_key_value_heads=1, attn_logit_softcapping=0.5)
    model.save_pretrained(tmp_path / "gemma2")
    given = run(model_name_or_path=model, dataset_name=SMALL, name="given")
    named = run(model_name_or_path=tmp_path / "gemma2", dataset_name=SMALL, name="named")
    assert given.frame.nll.to_numpy() == pytest.approx(named.frame.nll.to_numpy(), abs=1e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("experiment", ["attention_sinks", "h2o"])
def test_nothing_of_a_model_is_changed(run, family, experiment) -> None:
    model = STREAMABLE[family]()
    before = fingerprint(model), sorted(vars(model)), model.config.to_dict(), model.config._attn_implementation
    for engine in ("stepwise", "parallel"):
        with suppress(sinkbench.UserError):  # what the parallel engine refuses is left as it was too
            run(model_name_or_path=model, dataset_name=SMALL, experiment=experiment, engine=engine, overwrite=True)
    after = fingerprint(model), sorted(vars(model)), model.config.to_dict(), model.config._attn_implementation
    assert after == before


def test_a_run_of_a_model_at_hand_goes_on_with_its_weights_alone(run, llama) -> None:
    run(model_name_or_path=llama, num_tokens=20)
    assert run(model_name_or_path=copy.deepcopy(llama), num_tokens=40, resume=True).length == 40
    with torch.no_grad():
        llama.lm_head.weight[0, 0] += 1
    with pytest.raises(sinkbench.UserError, match="it is of another run, whose weights was object sha256"):
        run(model_name_or_path=llama, resume=True)


def test_a_run_by_name_does_not_go_on_with_an_object(run, llama) -> None:
    run(num_tokens=20)
    with pytest.raises(sinkbench.UserError, match="it is of another run, whose weights was"):
        run(model_name_or_path=llama, resume=True)


def test_a_model_of_which_a_part_cannot_be_known_never_goes_on(run, llama) -> None:
    llama.model.layers[0].register_forward_hook(lambda module, args, output: output)
    run(model_name_or_path=llama, num_tokens=20)
    with pytest.raises(sinkbench.UserError, match=r"weights was unknown: model\.layers\.0 has hooks"):
        run(model_name_or_path=llama, resume=True)


def test_a_class_of_ones_own_counts(run, llama) -> None:
    plain = run(model_name_or_path=llama, name="plain").record["key"]
    llama.__class__ = type("Mine", (type(llama),), {"__module__": "__main__"})
    assert "lies in no file" in run(model_name_or_path=llama, name="own").record["determined_by"]["weights"]
    assert run(model_name_or_path=llama, name="again").record["key"] != plain


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "bfloat16"),
        ("revision", "v1"),
        ("load_in_4bit", True),
        ("device_map", "cpu"),
        ("random_weights", True),
    ],
)
def test_an_option_that_says_how_a_model_is_loaded_is_refused_beside_one(run, llama, option, value) -> None:
    flag = option.replace("_", "-")
    with pytest.raises(sinkbench.UserError, match=f"^--{flag} says how the model is loaded, .*: leave it out$"):
        run(model_name_or_path=llama, **{option: value})


def test_what_is_no_causal_language_model_is_refused_in_one_line(run, llama) -> None:
    base = AutoModel.from_config(llama.config)
    for wrong in (base, llama.lm_head, 3, ["llama"]):
        with pytest.raises(sinkbench.UserError, match=r"^--model-name-or-path"):
            run(model_name_or_path=wrong)


def test_a_model_that_keeps_sinks_by_itself_is_refused_and_works_behind_that(run, llama) -> None:
    sinks = sinkbench.attention_sinks(llama, attention_sink_window_size=28)
    with sinks, pytest.raises(sinkbench.UserError, match="keeps sinks by itself"):
        run(model_name_or_path=llama)
    assert run(model_name_or_path=llama).length == 60


# Texts


def test_token_ids_may_be_lists_tensors_arrays_datasets_or_frames(run) -> None:
    wanted = list(run(name="named").frame.token)
    column = {"input_ids": [IDS]}
    for number, data in enumerate(
        (
            IDS,
            [IDS],
            tuple(IDS),
            torch.tensor(IDS),
            torch.tensor([IDS]).numpy(),
            datasets.Dataset.from_dict(column),
            datasets.Dataset.from_dict(column).with_format("torch"),
            datasets.Dataset.from_dict(column).to_iterable_dataset(),
            datasets.DatasetDict({"test": datasets.Dataset.from_dict(column)}),
            pd.DataFrame(column),
            iter([IDS]),
            [{"input_ids": IDS}],
        )
    ):
        assert list(run(dataset_name=data, name=f"given_{number}").frame.token) == wanted


def test_texts_are_read_by_a_tokenizer_at_hand(run, llama) -> None:
    words, read = "a b c d e f g h " * 10, tokenizer()
    one = run(model_name_or_path=llama, tokenizer=read, dataset_name=[words], name="one")
    assert list(one.frame.token[:4]) == [1, 2, 3, 4]
    several = run(model_name_or_path=llama, tokenizer=read, dataset_name=["a b", "c d"], name="several")
    assert list(several.frame.token) == [1, 2, 3]
    assert several.exit_reason == "dataset ended"
    first = run(model_name_or_path=llama, tokenizer=read, dataset_name=["a b", "c d"], num_samples=1, name="first")
    assert list(first.frame.token) == [1]


def test_a_tokenizer_may_be_a_name(run, llama, tmp_path) -> None:
    tokenizer().save_pretrained(tmp_path / "words")
    done = run(model_name_or_path=llama, tokenizer=str(tmp_path / "words"), dataset_name=["a b c"])
    assert list(done.frame.token) == [1, 2]


def test_a_text_without_a_tokenizer_is_refused(run, llama) -> None:
    with pytest.raises(sinkbench.UserError, match=r"a text needs a tokenizer, and the model is an object"):
        run(model_name_or_path=llama, dataset_name=["a b c"])
    with pytest.raises(sinkbench.UserError, match=r"^tokenizer must be a name, or a tokenizer of transformers"):
        run(tokenizer=3)


@pytest.mark.parametrize(
    "data", [3, b"text", [], [0.5, 1.5], [True, False], [["a"]], [None], iter([]), {"train": [IDS]}]
)
def test_what_holds_no_text_is_refused_in_one_line(run, data) -> None:
    with pytest.raises(sinkbench.UserError):
        run(dataset_name=data)


def test_an_option_that_says_how_a_dataset_is_fetched_is_refused_beside_one(run) -> None:
    with pytest.raises(sinkbench.UserError, match=r"^--task says how the dataset is loaded"):
        run(dataset_name=IDS, task="main")


# Strategies


def test_a_strategy_may_be_an_object_or_its_class(run) -> None:
    named = run(experiment="h2o", set={"recent": 8}, name="named")
    for number, (strategy, settings) in enumerate(
        [(H2O(recent=8), {}), (H2O, {"recent": 8}), (H2O(recent=4), {"recent": 8})]
    ):
        given = run(experiment=strategy, set=settings, name=f"given_{number}")
        assert given.record["key"] == named.record["key"]
    assert run(experiment=H2O(recent=8)).name == "h2o-recent_8"


@pytest.mark.parametrize("strategy", [Newest, Loudest])
@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_one_of_ones_own_runs_on_both_engines_and_goes_on(run, strategy, engine) -> None:
    run(experiment=strategy(), engine=engine, num_tokens=20)
    done = run(experiment=strategy, engine=engine, resume=True)
    assert done.length == 60
    assert done.strategy == strategy.__name__.lower()


def test_one_that_goes_by_position_is_what_windowed_is(run) -> None:
    assert list(run(experiment=Newest()).frame.nll) == list(run(experiment="windowed").frame.nll)


def test_one_of_a_notebook_runs_and_never_goes_on(run) -> None:
    mine = in_no_file()
    assert run(experiment=mine, num_tokens=20).length == 20
    with pytest.raises(sinkbench.UserError, match="whose source was unknown: Mine lies in no file"):
        run(experiment=mine, resume=True)


def test_what_is_no_strategy_is_refused_in_one_line(run) -> None:
    class Idle(Strategy):
        """Says nothing."""

    class Like:
        def policy(self, window: int) -> None: ...

    for wrong in (int, Idle, Idle(), Like(), Like, 3, object()):
        with pytest.raises(sinkbench.UserError, match=r"^--experiment"):
            run(experiment=wrong)
