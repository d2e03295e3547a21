"""Endless text and endless conversations from the command line, and what is measured of them."""

import io
import json

import pandas as pd
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkbench.api import chat as chatting
from sinkbench.api import decoding as speaking
from sinkbench.api.decoding import Detokenizer, Sampling, Session, stream_tokens
from sinkbench.errors import UserError
from sinkbench.metrics import fluency
from sinkbench.metrics.fluency import NonWords, Repetition, words_of
from sinkbench.results.columns import SEED_COLUMNS
from sinkbench.results.reading import read_csv, read_runs

TEMPLATE = (
    "{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    specials = ["<pad>", "<bos>", "<end>", "<user>", "<bot>"]
    words = {word: i for i, word in enumerate([*specials, *(f"w{i}" for i in range(len(specials), tiny.VOCABULARY))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    where = tmp_path_factory.mktemp("model")
    tiny.ROTARY["llama"]().save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def write(folder, tmp_path, here):
    def call(*arguments):
        sizes = ("--window_size", "16", "--model-name-or-path", str(folder), "--dtype", "float32")
        return here("generate", *sizes, "--prompt", "w9 w17 w30", "--output-dir", str(tmp_path), *arguments)

    return call


# Speaking


@pytest.mark.parametrize("experiment", ["attention_sinks", "windowed", "transformers", "recompute"])
def test_text_is_written_under_any_strategy_and_shown_as_it_comes(experiment, write, tmp_path, tokenizer):
    status, out, err = write("--experiment", experiment, "--max-new-tokens", "40")
    assert (status, "finished: 40 tokens" in err) == (0, True)
    record = json.loads((tmp_path / f"generate_{experiment}.json").read_text())
    frame = pd.read_csv(tmp_path / f"generate_{experiment}.csv")
    assert out == "w9 w17 w30" + record["text"] + "\n"
    assert list(frame.token) == tokenizer(record["text"])["input_ids"]
    assert not set(frame.token) & set(range(5))  # no special token
    assert (len(frame), record["rows"], record["exit_reason"]) == (40, 40, "finished")
    cap = {"transformers": 42, "recompute": 0}.get(experiment, 16)
    assert frame.kv_cache_bytes.max() == cap * 2 * 4 * 2 * 16 * 2  # keys and values, float32, heads, features, layers
    # what was said, again
    model = tiny.ROTARY["llama"]()
    tokens = torch.tensor([9, 17, 30, *frame.token])
    session = Session(model, tiny.plan(model, experiment, 16))
    again = [-float(session.read(tokens[:3]).log_softmax(-1)[tokens[3]])]
    for i in range(3, 42):
        again.append(-float(session.read(tokens[i : i + 1]).log_softmax(-1)[tokens[i + 1]]))
    assert frame.nll.to_list() == pytest.approx(again, abs=2e-4)


def test_the_seed_decides_and_zero_temperature_takes_the_likeliest(write, tmp_path):
    tokens = []
    for options in (("--seed", "1"), ("--seed", "1"), ("--seed", "2"), ("--temperature", "0")):
        assert write("--max-new-tokens", "30", "--overwrite", *options)[0] == 0
        tokens.append(list(pd.read_csv(tmp_path / "generate_attention_sinks.csv").token))
    assert tokens[0] == tokens[1] != tokens[2]
    model = tiny.ROTARY["llama"]()
    generated = stream_tokens(
        Session(model, tiny.plan(model, "attention_sinks", 16)),
        [9, 17, 30],
        Sampling(0, 1.0, (0, 1, 2, 3, 4)),
        torch.Generator(),
    )
    assert tokens[3] == [next(generated).token for _ in range(30)]


def test_top_p_leaves_the_likeliest_only():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.25, 0.15]))
    generator = torch.Generator().manual_seed(0)
    found = {Sampling(1.0, 0.7).choose(logits, generator) for _ in range(200)}
    assert found == {1, 2}
    assert {Sampling(1.0, 0.0).choose(logits, generator) for _ in range(20)} == {1}


def test_pieces_of_text_put_together_are_the_text():
    class Bytes:
        def decode(self, tokens, clean_up_tokenization_spaces=False):
            return bytes(tokens).decode("utf-8", errors="replace")

    text = "plain, ümlaut, 漢字, 👩‍🚀 and on"
    detokenizer = Detokenizer(Bytes())
    assert "".join(detokenizer.put(b) for b in text.encode()) == text


# Fluency


def test_nll_with_fresh_context_is_that_of_dense_forwards(write, tmp_path, monkeypatch):
    for module in (fluency, __import__("sinkbench.api.generation", fromlist=["x"])):
        monkeypatch.setattr(module, "BLOCK", 10)
    assert write("--max-new-tokens", "34")[0] == 0
    frame = pd.read_csv(tmp_path / "generate_attention_sinks.csv")
    tokens, model = torch.tensor([9, 17, 30, *frame.token]), tiny.ROTARY["llama"]()
    expected = []
    for begin in range(3, 37, 10):
        window = tokens[max(0, begin - 10) : begin + 10]
        with torch.no_grad():
            shares = model(window[None], use_cache=False).logits[0].log_softmax(-1)
        first = min(begin, 10)
        expected += [-float(shares[i - 1, window[i]]) for i in range(first, len(window))]
    assert frame.fresh_nll.to_list() == pytest.approx(expected, abs=2e-4)


def test_repetition_is_the_share_of_repeated_4_grams():
    def rates(tokens):
        seen = Repetition()
        return [seen.put(token) for token in tokens]

    assert rates([1, 2, 3]) == [None] * 3
    assert rates(range(1000))[3:] == [0.0] * 997
    assert rates([7] * 300)[-1] == pytest.approx(1 - 1 / 253)
    assert rates([1, 2, 3, 4, 1, 2, 3, 4])[-1] == pytest.approx(1 / 5)
    tokens = tiny.tokens(2000).remainder(3).tolist()
    last = tokens[-256:]
    grams = [tuple(last[i : i + 4]) for i in range(253)]
    assert rates(tokens)[-1] == pytest.approx(1 - len(set(grams)) / 253)


def test_non_words_are_words_that_the_vocabulary_lacks():
    class Letters:
        def decode(self, tokens, clean_up_tokenization_spaces=False):
            return "".join(map(chr, tokens))

    assert words_of("Don't stop: it’s 3 o'clock, naïve_One!") == ["don't", "stop", "it’s", "o'clock", "naïve", "one"]
    rate = NonWords(Letters(), frozenset(("the", "cat", "sat")))
    rates = [rate.put(ord(c)) for c in "xx The cat sbt cut"]
    assert (rates[0], rates[-1]) == (None, pytest.approx(1 / 3))
    assert NonWords(Letters(), frozenset()).put(ord("x")) is None


# Files


def test_plot_draws_generated_text(write, tmp_path, here):
    for experiment in ("attention_sinks", "windowed"):
        assert write("--experiment", experiment, "--max-new-tokens", "30")[0] == 0
    assert list(read_runs(tmp_path)) == ["windowed", "attention_sinks"]
    status, *_ = here(
        *("plot", "--output-dir", str(tmp_path), "--skip-first", "3", "--log-perplexity-limit", "0"),
        *("--features", "fluency", "repetition", "perplexity"),
    )
    assert (status, (tmp_path / "fluency_repetition_perplexity.png").stat().st_size > 10_000) == (0, True)


def test_results_of_runs_have_no_fluency(tmp_path):
    (tmp_path / "windowed.csv").write_text(f"{','.join(SEED_COLUMNS)}\n1,2,3,4,,5\n")
    assert read_csv(tmp_path / "windowed.csv").fresh_nll.isna().all()


def test_errors_of_generate_are_one_line(write, tmp_path):
    assert write("--prompt", "")[::2] == (2, "sinkbench: the prompt is empty: give at least one token to begin with\n")
    assert not list(tmp_path.iterdir())
    assert write("--max-new-tokens", "3")[0] == 0
    status, _, err = write("--max-new-tokens", "3")
    assert (status, "already exists: give --overwrite" in err) == (2, True)


def test_an_interrupted_text_keeps_its_rows(folder, tmp_path, monkeypatch):
    from sinkbench.api import generation
    from sinkbench.config import GenerateConfig

    def stop(text, shown=[]):  # noqa: B006
        shown.append(text)
        if len(shown) > 20:
            raise generation.Interrupted(2)

    options = GenerateConfig(
        model_name_or_path=str(folder), dtype="float32", prompt="w9", window_size=16, output_dir=tmp_path
    )
    written = generation.generate(options, stop)
    assert written.interrupted
    assert len(pd.read_csv(options.csv)) == len(written.said) == 20


# Conversations


@pytest.fixture
def chat(tokenizer):
    model = tiny.ROTARY["llama"]()
    return chatting.Chat(model, tokenizer, tiny.plan(model, "attention_sinks", 32), Sampling(1.0, 1.0, (2,)), seed=1)


def test_only_what_is_new_is_fed_and_memory_is_constant(chat, monkeypatch):
    fed = []
    real = Session.read
    monkeypatch.setattr(Session, "read", lambda self, tokens: (fed.extend(tokens), real(self, tokens))[1])
    sizes = set()
    for turn in range(30):
        "".join(chat.say(f"w{turn + 10} w7", 8))
        sizes |= {(chat.session.held, chat.session.kv_cache_bytes)} if turn > 3 else set()
    assert sizes == {(32, 32 * 2 * 4 * 2 * 16 * 2)}
    assert (chat.turns, len(fed)) == (30, chat.tokens)
    assert fed[:5] == [3, 10, 7, 2, 4]
    assert fed[13:19] == [2, 3, 11, 7, 2, 4]  # the answer's end comes with the next message
    assert "30 turns" in chat.stats()
    chat.reset()
    assert (chat.turns, chat.session.held) == (0, 0)


def test_an_answer_ends_where_the_template_ends_it(chat, monkeypatch):
    said = iter([50, 51, 2, 52])
    monkeypatch.setattr(speaking.Sampling, "choose", lambda self, logits, generator: next(said))
    assert "".join(chat.say("w9", 100)).split() == ["w50", "w51"]
    assert chat.tokens == 4 + 2


def test_chat_reads_lines_where_there_is_no_terminal(folder, here, monkeypatch):
    lines = "w9 w10\n/stats\n\n/nonsense\n/reset\n/stats\nw11\n/quit\nw12\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    status, out, _ = here("chat", "--window-size", "16", "--max_new_tokens", "5", "--model-name-or-path", str(folder))
    assert status == 0
    shown = out.splitlines()
    assert shown[1].startswith("1 turns")
    assert shown[2].startswith("no command /nonsense: /stats")
    assert (shown[3], shown[4][:7], len(shown)) == ("a new conversation", "0 turns", 6)


def test_a_model_without_a_template_is_a_clear_error(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    model = tiny.ROTARY["llama"]()
    with pytest.raises(UserError, match="no chat template"):
        chatting.Chat(model, bare, tiny.plan(model, "attention_sinks", 32), Sampling())


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_fits_80_columns(command, sinkbench):
    shown = sinkbench(command, "--help").stdout
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
