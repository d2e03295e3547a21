"""``--protocol``: the numbers of a few plain lines of transformers, in the same files."""

import json

import pandas as pd
import pytest
import torch
from golden import golden_options, golden_tokens

from sinkbench.config import ModelSource, RunConfig, Source
from sinkbench.data.stream import read_stream
from sinkbench.errors import UserError
from sinkbench.models.loading import load_model, load_tokenizer, locate

CLOSE = 1e-5
TOKENS = 300


def nll(model, inputs, labels):
    """-ln p of the last ``len(labels)`` next tokens, by a forward of its own."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([inputs])).logits[0, -len(labels) :]
    return torch.nn.functional.cross_entropy(logits.float(), torch.tensor(labels), reduction="none").tolist()


def windows(model, text, length, stride, bos):
    found = {}
    for i in range(len(text) // length):
        x = text[i * length : (i + 1) * length]
        found |= zip(range(i * length + 1, (i + 1) * length), nll(model, x[:-1], x[1:]), strict=True)
    return found


def strided(model, text, length, stride, bos):
    found, before = {}, 0
    for begin in range(0, len(text), stride):
        end = min(begin + length, len(text))
        labels = text[max(before, begin + 1) : end]
        if labels:
            found |= zip(range(end - len(labels), end), nll(model, text[begin : end - 1], labels), strict=True)
        before = end
        if end == len(text):
            break
    return found


def llamacpp(model, text, length, stride, bos):
    found, first = {}, length // 2
    for i in range(len(text) // length):
        x = text[i * length : (i + 1) * length]
        fed = x if bos is None else [bos, *x[1:]]
        values = nll(model, fed[:-1], x[first + 1 :])
        assert len(values) == length - 1 - first
        found |= zip(range(i * length + first + 1, (i + 1) * length), values, strict=True)
    return found


def rolling(model, text, length, stride, bos):
    found = dict(enumerate(nll(model, [bos, *text[: length - 1]][: len(text)], text[:length])))
    for begin in range(length, len(text), length):
        end = min(begin + length, len(text))
        found |= zip(range(begin, end), nll(model, text[end - length - 1 : end - 1], text[begin:end]), strict=True)
    return found


BY_HAND = {"windows": windows, "strided": strided, "llamacpp": llamacpp, "rolling": rolling}


def run(out, *more):
    return ["run", "--output-dir", out, "--experiment", "transformers", *more]


def assert_same(csv, wanted, text):
    found = pd.read_csv(csv, float_precision="round_trip")
    assert list(found.input_length) == list(wanted)
    assert list(found.token) == [text[index] for index in wanted]
    assert found.nll.to_numpy() == pytest.approx(list(wanted.values()), abs=CLOSE)
    assert found.overall_ppl.iloc[-1] == pytest.approx(float(torch.tensor(list(wanted.values())).double().mean().exp()))
    assert found.latency.isna().all() and (found.kv_cache_bytes == 0).all()


@pytest.mark.parametrize("chunk", [(), ("--chunk-size", 1), ("--chunk-size", 100)])
@pytest.mark.parametrize(
    ("protocol", "length", "stride"),
    [
        *(("windows", 32, None), ("windows", 301, None), ("llamacpp", 33, None), ("llamacpp", 32, None)),
        *(
            ("strided", 32, 10),
            ("strided", 32, 32),
            ("strided", 400, 7),
            ("rolling", 32, None),
            ("rolling", 1000, None),
        ),
    ],
)
def test_rows_are_those_of_plain_lines_of_transformers(protocol, length, stride, chunk, here, tmp_path):
    cut = ("--context-length", length, *(("--stride", stride) if stride else ()))
    asked = ("--protocol", protocol, *cut, *chunk, "--num-tokens", TOKENS)
    status, _, err = here(*run(tmp_path, *golden_options("llama")[:-6], *asked, "--dtype", "float32"))
    assert status == 0, err
    model = load_model(locate(ModelSource(golden_options("llama")[1], dtype="float32")))
    text = golden_tokens("llama")[: TOKENS + (protocol != "rolling")].tolist()
    wanted = BY_HAND[protocol](model, text, length, stride, model.config.bos_token_id)
    assert_same(tmp_path / "transformers.csv", wanted, text)
    record = json.loads((tmp_path / "transformers.json").read_text())
    said = record["protocol"]
    assert (said["name"], said["context_length"], said["stride"]) == (protocol, length, stride)
    assert (record["exit_reason"], record["rows"]) == ("finished", len(wanted))


@pytest.mark.heavy
@pytest.mark.parametrize("protocol", BY_HAND)
def test_so_they_are_of_the_embedded_model(protocol, here, tmp_path):
    length, stride, n = 96, (40 if protocol == "strided" else None), 300
    cut = ("--context-length", length, *(("--stride", stride) if stride else ()))
    assert here(*run(tmp_path, "--protocol", protocol, *cut, "--num-tokens", n))[0] == 0
    checkpoint = locate(ModelSource("smollm2-135m"))
    tokenizer = load_tokenizer(checkpoint)
    text = read_stream(Source("kjv"), n + (protocol != "rolling"), lambda: tokenizer).tokens.tolist()
    wanted = BY_HAND[protocol](load_model(checkpoint), text, length, stride, tokenizer.bos_token_id)
    assert_same(tmp_path / "transformers.csv", wanted, text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--experiment", "windowed"), "give --experiment transformers"),
        (("--kv-format", "q8_0"), "--kv-format"),
        (("--reference", "transformers"), "--reference exclude each other"),
        (("--documents",), "--documents exclude each other"),
        (("--resume",), "--resume exclude each other"),
        (("--trace",), "--trace exclude each other"),
        (("--stride", 9), "--stride goes with --protocol strided alone"),
        (("--protocol", "stream", "--context-length", 9), "--context-length goes with a --protocol other than stream"),
        (("--protocol", "strided", "--context-length", 9, "--stride", 10), "would leave tokens out"),
        (("--context-length", 1), "at least 2"),
        (("--context-length", 0), "--context-length must be an integer of at least 1"),
        (("--protocol", "sliding"), "--protocol"),
        (("--context-length", 900, "--num-tokens", 300), "the text has 301 tokens"),
    ],
)
def test_what_does_not_go_together_is_one_line_and_nothing_is_written(options, said, here, tmp_path):
    asked = ("--protocol", "windows", *golden_options("llama")[:-6], *options)
    status, _, err = here(*run(tmp_path / "out", *asked))
    assert status == 2
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_windows_are_the_usual_ones_of_a_protocol_and_many_tokens_pass_at_once():
    asked = {"experiment": "transformers"}
    usual = {name: RunConfig(protocol=name, **asked) for name in ("windows", "strided", "llamacpp", "rolling")}
    assert [config.context_length for config in usual.values()] == [2048, 2048, 512, 2048]
    assert [config.stride for config in usual.values()] == [None, 1024, None, None]
    assert {config.engine for config in usual.values()} == {"parallel"}
    assert RunConfig().context_length is None
    same = RunConfig(protocol="windows", context_length=2048, **asked)
    assert same.deciding == usual["windows"].deciding != RunConfig(engine="parallel", **asked).deciding


def test_every_so_many_th_row_can_be_written(here, tmp_path):
    asked = ("--protocol", "windows", "--context-length", 32, "--num-tokens", TOKENS, "--dtype", "float32")
    for out, every in (("all", 1), ("few", 10)):
        here(*run(tmp_path / out, *golden_options("llama")[:-6], *asked, "--every", every))
    whole, few = (pd.read_csv(tmp_path / out / "transformers.csv") for out in ("all", "few"))
    assert set(few.input_length) < set(whole.input_length)
    assert few.overall_ppl.iloc[-1] == pytest.approx(whole.overall_ppl.iloc[-1], rel=1e-9)


def test_compare_and_report_take_them(here, tmp_path):
    model = golden_options("llama")[:-6]
    here(*run(tmp_path, *model, "--protocol", "strided", "--context-length", 64, "--num-tokens", TOKENS))
    here("run", "--output-dir", tmp_path, *model, "--experiment", "windowed", "--num-tokens", TOKENS)
    status, out, _ = here("compare", tmp_path)
    assert status == 0 and f"over the first {TOKENS} tokens" in out
    assert here("report", tmp_path)[0] == 0
    page = (tmp_path / "report.md").read_text()
    assert "rows missing" not in page and "does not fit" not in page
    assert "perplexities are over different predictions" in page


def test_rolling_needs_a_token_to_begin_with(here, tmp_path):
    folder = tmp_path / "model"
    model = load_model(locate(ModelSource(golden_options("llama")[1], dtype="float32")))
    model.config.bos_token_id = model.config.eos_token_id = None
    model.generation_config = type(model.generation_config)()
    model.save_pretrained(folder)
    options = ["--model-name-or-path", folder, *golden_options("llama")[2:-6], "--num-tokens", TOKENS]
    status, _, err = here(*run(tmp_path / "out", *options, "--protocol", "rolling"))
    assert status == 2 and "begins with BOS or EOS" in err
    assert not (tmp_path / "out").exists()
    assert here(*run(tmp_path / "out", *options, "--protocol", "llamacpp", "--context-length", 64))[0] == 0


def test_windows_longer_than_a_table_of_positions_are_refused():
    import tiny

    from sinkbench.data.protocols import windows_of
    from sinkbench.engines.windows import read_windows

    model = tiny.build("gpt2", n_positions=32)
    with pytest.raises(UserError):
        next(read_windows(model, tiny.tokens(90), windows_of("windows", 90, 40), None))
    found = [
        value
        for steps in read_windows(model, tiny.tokens(90), windows_of("windows", 90, 32), None)
        for value in steps.nll
    ]
    assert len(found) == 62
