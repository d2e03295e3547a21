"""The text that tokens spell: byte by byte what was tokenised, whatever the kind of tokenizer."""

import json
from math import exp, log

import pytest
from golden import GOLDEN
from hub_runs import tokenizer_files
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sinkbench.data.spelling import predicted_text, spelled

TEXT = "In the beginning 漢字 naïve 🙂\u200d↔ café\n\n\t  x  end "


def fast(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return fast(tokenizer, eos_token="<eos>")


def without_decoder():
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.decoder = None
    return tokenizer


def sentencepiece(begins=True):
    """As Llama 2's: a space before the text, bytes for what the vocabulary lacks, a token that begins it."""
    pieces = [
        "<s>",
        "</s>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzI",
        "▁x",
    ]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "x")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "byte level": byte_level,
    "byte level without a decoder": without_decoder,
    "SentencePiece": sentencepiece,
    "SentencePiece without a first token": lambda: sentencepiece(False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_spell_the_bytes_of_the_text_behind_the_first(kind):
    tokenizer = KINDS[kind]()
    ids = tokenizer(TEXT)["input_ids"]
    whole = spelled(tokenizer, ids, literal=True)
    assert len(ids) > 20
    assert TEXT.encode().endswith(whole)
    first = len(TEXT.encode()) - len(whole)
    assert first == {"SentencePiece": 0, "SentencePiece without a first token": 0}.get(kind, first)
    assert first < len(b"In the")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_characters_count_their_bytes_so_that_rows_add_up(kind):
    tokenizer = KINDS[kind]()
    ids = tokenizer(TEXT)["input_ids"]
    sizes = [predicted_text(tokenizer, [ids[:n]], literal=True) for n in range(1, len(ids) + 1)]
    whole = spelled(tokenizer, ids, literal=True)
    several = predicted_text(tokenizer, [ids, ids[:3]], literal=True)
    assert (several.tokens, several.bytes) == (sizes[-1].tokens + 2, sizes[-1].bytes + sizes[2].bytes)
    assert (sizes[0].tokens, sizes[0].bytes) == (0, 0)
    assert sizes[-1].bytes == len(whole)
    assert sizes[-1].words == len(whole.decode().split())
    assert all(whole.startswith(spelled(tokenizer, ids[:n], literal=True)) for n in range(1, len(ids)))


def test_a_special_token_stands_for_itself_in_a_text_and_for_nothing_between_documents():
    tokenizer = byte_level()
    ids = tokenizer("a b<eos>c")["input_ids"]
    assert spelled(tokenizer, ids, literal=True).endswith(b"b<eos>c")
    assert spelled(tokenizer, ids, literal=False).endswith(b"bc")


def test_a_tokenizer_of_an_unknown_kind_decodes_for_itself():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "in": 1, "the": 2, "be": 3, "##gin": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    found = predicted_text(fast(tokenizer), [[1, 2, 3, 4]], literal=True)
    assert (found.tokens, found.words) == (3, 2)
    assert found.bytes == len(" the begin")


@pytest.fixture
def model(tmp_path):
    """A tiny model with a tokenizer of bytes, and a text of two rows."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (GOLDEN / "llama").iterdir():
        if path.suffix in (".json", ".safetensors") and "tokenizer" not in path.name:
            (folder / path.name).symlink_to(path)
    for name, data in tokenizer_files(tmp_path / "tokenizer").items():
        (folder / name).write_bytes(data)
    rows = tmp_path / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("In the beginning 漢字 " * 4, "naïve end")))
    return folder, rows


def run(here, model, out, *options):
    folder, rows = model
    line = ("--model-name-or-path", folder, "--dataset-name", rows, "--data-column", "text", "--num-samples", "2")
    return here("run", *line, "--output-dir", out, "--dtype", "float32", *options)


def of_record(out):
    return json.loads((out / "attention_sinks.json").read_text())["predicted_text"]


def test_the_record_says_how_much_text_the_rows_predict_also_of_a_run_that_was_resumed(model, here, tmp_path):
    text = "In the beginning 漢字 " * 4 + "\nnaïve end"
    assert run(here, model, tmp_path / "whole", "--num-tokens", "1000")[0] == 0
    expected = {"tokens": len(text.encode()) - 1, "bytes": len(text.encode()) - 1, "words": len(text[1:].split())}
    assert of_record(tmp_path / "whole") == expected
    assert run(here, model, tmp_path / "parts", "--num-tokens", "20")[0] == 0
    assert of_record(tmp_path / "parts") == {"tokens": 20, "bytes": 20, "words": 4}
    assert run(here, model, tmp_path / "parts", "--num-tokens", "1000", "--resume")[0] == 0
    assert of_record(tmp_path / "parts") == expected


def test_documents_predict_the_text_of_all_but_the_first_token_of_each(model, here, tmp_path):
    rows = "In the beginning 漢字 " * 4, "naïve end"
    line = ("--num-tokens", "1000", "--documents")
    for name in ("attention_sinks", "windowed"):
        assert run(here, model, tmp_path, *line, "--experiment", name, "--window-size", "16")[0] == 0
    predicted = sum(len(row.encode()) - 1 for row in rows)
    assert of_record(tmp_path) == {"tokens": predicted, "bytes": predicted, "words": 16 + 2}
    units = json.loads(here("compare", tmp_path, "--format", "json")[1])["units"]
    assert [row["run"] for row in units] == ["windowed", "attention_sinks"]


@pytest.mark.parametrize(
    "protocol, predicted",
    [
        ("windows", lambda n: sum(begin + 16 <= n for begin in range(0, n, 16)) * 15),
        ("strided", lambda n: n - 1),
        ("llamacpp", lambda n: n // 16 * 7),
    ],
)
def test_windows_of_a_protocol_predict_the_text_of_the_tokens_that_count(protocol, predicted, model, here, tmp_path):
    length = len(("In the beginning 漢字 " * 4 + "\nnaïve end").encode())
    line = ("--experiment", "transformers", "--num-tokens", "1000", "--protocol", protocol, "--context-length", "16")
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        assert run(here, model, folder, *line)[0] == 0
    record = json.loads((folders[0] / "transformers.json").read_text())
    size = record["predicted_text"]
    assert (size["tokens"], size["bytes"]) == (predicted(length),) * 2
    units = json.loads(here("compare", *folders, "--format", "json")[1])["units"]
    assert units[0]["bits_per_byte"] == pytest.approx(log(record["overall_ppl"]) / log(2))
    assert here("report", folders[0])[0] == 0
    assert "Bits per byte" in (folders[0] / "report.md").read_text()


def test_stretches_of_a_text_spell_what_lies_in_them():
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    halves = [(1, 9), (9, len(ids))]
    whole, parts = (predicted_text(tokenizer, [ids], True, stretches) for stretches in (None, halves))
    assert (parts.tokens, parts.bytes) == (whole.tokens, whole.bytes)
    left, right = (predicted_text(tokenizer, [ids], True, [half]) for half in halves)
    assert (left.bytes + right.bytes, left.words + right.words) == (parts.bytes, parts.words)


def test_compare_and_report_show_units_of_the_text(model, here, tmp_path):
    out = tmp_path / "out"
    for name in ("attention_sinks", "windowed"):
        line = ("--experiment", name, "--window-size", "16", "--num-tokens", "1000")
        assert run(here, model, out, *line)[0] == 0
    document = json.loads(here("compare", out, "--format", "json")[1])
    size = of_record(out)
    record = json.loads((out / "windowed.json").read_text())
    (row,) = [row for row in document["units"] if row["run"] == "windowed"]
    nats = log(record["overall_ppl"]) * size["tokens"]
    assert row["bits_per_byte"] == pytest.approx(nats / log(2) / size["bytes"])
    assert row["word_perplexity"] == pytest.approx(exp(nats / size["words"]))
    assert row["bits_per_byte_low"] <= row["bits_per_byte"] <= row["bits_per_byte_high"]
    assert here("report", out)[0] == 0
    assert "Bits per byte" in (out / "report.md").read_text()


def test_data_that_is_tokenised_already_has_no_units_where_there_is_no_tokenizer(here, tmp_path):
    line = ("--model-name-or-path", GOLDEN / "llama", "--dataset-name", GOLDEN / "llama" / "tokens.jsonl")
    options = ("--data-column", "input_ids", "--num-tokens", "20", "--dtype", "float32", "--output-dir", tmp_path)
    assert here("run", *line, *options)[0] == 0
    assert "predicted_text" not in json.loads((tmp_path / "attention_sinks.json").read_text())


def test_the_embedded_model_spells_its_text():
    from sinkbench.config import ModelSource
    from sinkbench.models.loading import load_tokenizer, locate

    tokenizer = load_tokenizer(locate(ModelSource("smollm2-135m")))
    ids = tokenizer(TEXT)["input_ids"]
    assert TEXT.encode() == b"In" + spelled(tokenizer, ids, literal=True)
