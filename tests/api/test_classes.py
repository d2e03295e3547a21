"""The drop-in API: transformers' own models, whose forward and generate keep attention sinks."""

import copy
import gc
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import oracle as slow
import pytest
import tiny
import torch
import transformers
from conftest import GOLDEN
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, StoppingCriteria, TextStreamer

import sinkbench
from sinkbench import SinkCache, attention_sinks
from sinkbench.api.forward import read
from sinkbench.engines.stepwise import stepwise
from sinkbench.errors import UserError
from sinkbench.strategies import Keep

SINKS, RECENT = 4, 12
SIZES = {"attention_sink_size": SINKS, "attention_sink_window_size": RECENT}
GREEDY = {"do_sample": False, "eos_token_id": None}
METHODS = ("forward", "generate", "prepare_inputs_for_generation")

every_family = pytest.mark.parametrize("family", tiny.STREAMABLE)
# of each way to read a long prompt: in chunks, by an adapter, with ALiBi, mixed layers, token by token
some_families = pytest.mark.parametrize("family", ["llama", "gptj", "mpt", "gemma3", "qwen3_next", "dynamic"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def model_of(family: str) -> PreTrainedModel:
    return tiny.STREAMABLE[family]()


@pytest.fixture
def llama():
    with attention_sinks(model_of("llama"), **SIZES) as model:
        yield model


def state(model: PreTrainedModel) -> dict:
    return dict(vars(model))


def padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The rows with padding on their left."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


def benchmark(model: PreTrainedModel, stream: torch.Tensor, sinks=SINKS, recent=RECENT) -> torch.Tensor:
    return torch.tensor([step.nll[0] for step in stepwise(model, Keep(sinks, recent), stream)])


def nlls(model: PreTrainedModel, stream: torch.Tensor, **kwargs) -> torch.Tensor:
    logits = model(stream[None, :-1], **kwargs).logits[0]
    return cross_entropy(logits, stream[1:], reduction="none")


# Equality


@every_family
def test_generated_tokens_are_those_of_the_oracle(family, monkeypatch):
    model, prompt = model_of(family), tiny.tokens(22)
    with attention_sinks(model, **SIZES):
        ids = model.generate(prompt[None], max_new_tokens=8, **GREEDY)[0]

    def choice(model, cache, stream, t, position):
        places = {"position_ids": torch.tensor([[position]])} if model.config.model_type not in ("bloom", "mpt") else {}
        return float(model(stream[None, t : t + 1], past_key_values=cache, use_cache=True, **places).logits.argmax())

    monkeypatch.setattr(slow, "_nll", choice)
    chosen = slow.oracle(model, ids, SINKS + RECENT, SINKS).long()
    assert ids[22:].tolist() == chosen[21:].tolist()


@every_family
def test_forward_answers_as_the_benchmark(family):
    model, stream = model_of(family), tiny.tokens(50)
    expected = benchmark(model, stream)
    with attention_sinks(model, **SIZES):
        whole = model(stream[None, :-1])
        assert cross_entropy(whole.logits[0], stream[1:], reduction="none").sub(expected).abs().max() < 2e-4
        cache = None
        parts = []
        for part in stream[:-1].split([3, 1, 20, 1, 24]):
            outputs = model(part[None], past_key_values=cache)
            cache = outputs.past_key_values
            parts.append(outputs.logits[0])
    assert cross_entropy(torch.cat(parts), stream[1:], reduction="none").sub(expected).abs().max() < 2e-4
    assert (cache.seen, cache.held, cache.get_seq_length()) == (49, SINKS + RECENT, 49)


@some_families
def test_a_long_prompt_leaves_the_cache_as_token_by_token_does(family):
    model, prompt, rest = model_of(family), tiny.tokens(40), tiny.tokens(12, seed=1)
    with attention_sinks(model, **SIZES):
        at_once = model(prompt[None]).past_key_values
        slowly = None
        for token in prompt:
            slowly = model(token[None, None], past_key_values=slowly).past_key_values
        for token in rest:
            a, b = (model(token[None, None], past_key_values=c).logits for c in (at_once, slowly))
            assert (a - b).abs().max() < 2e-4


def test_a_long_prompt_takes_one_forward_of_the_model_and_not_one_a_token(llama):
    calls = []
    hook = llama.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    cache = SinkCache(llama, **SIZES)
    calls.clear()
    llama(tiny.tokens(100)[None], past_key_values=cache)
    hook.remove()
    assert len(calls) == 1


def test_chunks_of_a_prompt_do_not_change_the_answer(llama, monkeypatch):
    stream = tiny.tokens(60)
    whole = nlls(llama, stream)
    monkeypatch.setattr("sinkbench.api.forward.chunk_for", lambda model: 7)
    assert (nlls(llama, stream) - whole).abs().max() < 2e-4
    outputs = llama(stream[None], output_hidden_states=True, logits_to_keep=10)
    assert outputs.logits.shape == (1, 10, tiny.VOCABULARY)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(1, 60, 64)] * 3


def test_loss_is_that_of_the_labels(llama):
    stream = tiny.tokens(50)
    outputs = llama(stream[None], labels=stream[None])
    assert outputs.loss == pytest.approx(float(benchmark(model_of("llama"), stream).mean()), abs=1e-4)
    assert llama(stream[None], labels=stream[None], return_dict=False)[0] == outputs.loss


def test_inputs_may_be_embeddings(llama):
    prompt = tiny.tokens(30)[None]
    embedded = llama.get_input_embeddings()(prompt)
    assert torch.allclose(llama(inputs_embeds=embedded).logits, llama(prompt).logits, atol=1e-5)
    ids = llama.generate(prompt, max_new_tokens=6, **GREEDY)
    assert torch.equal(llama.generate(inputs_embeds=embedded, max_new_tokens=6, **GREEDY), ids[:, 30:])


# Decoding


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 20, "top_p": 0.9}])
def test_sampling_draws_from_the_right_distribution(llama, how):
    prompt = tiny.tokens(30)
    settings = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 12, "top_k": 0} | how
    torch.manual_seed(3)
    ids = llama.generate(prompt[None], **settings, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(3)
    assert torch.equal(llama.generate(prompt[None], **settings), ids.sequences)
    with torch.no_grad():
        expected = llama(ids.sequences[:, :-1]).logits[0, 29:]
    assert (torch.cat(ids.logits) - expected).abs().max() < 2e-3


def test_beam_search_finds_the_best_of_what_it_kept(llama):
    prompt = torch.stack([tiny.tokens(25), tiny.tokens(25, seed=1)])
    found = llama.generate(
        prompt,
        num_beams=3,
        max_new_tokens=10,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_scores=True,
        **GREEDY,
    )
    for ids, score in zip(found.sequences, found.sequences_scores):
        assert float(-nlls(llama, ids)[24:].mean()) == pytest.approx(float(score), abs=1e-4)
    alone = llama.generate(prompt[1:], num_beams=3, max_new_tokens=10, **GREEDY)
    assert torch.equal(found.sequences[3], alone[0])


def test_beam_search_of_rows_of_different_lengths(llama):
    rows = tiny.tokens(30), tiny.tokens(9, seed=1)
    together = llama.generate(**padded(*rows), num_beams=3, max_new_tokens=12, **GREEDY)
    for row, ids in zip(rows, together):
        alone = llama.generate(row[None], num_beams=3, max_new_tokens=12, **GREEDY)
        assert torch.equal(ids[30 - len(row) :], alone[0])


class Written(TextStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.got.append("end")


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 35)


def test_streamers_and_stopping_criteria(llama):
    streamer = Written()
    ids = llama.generate(
        tiny.tokens(30)[None], streamer=streamer, stopping_criteria=[AfterFive()], max_new_tokens=50, **GREEDY
    )
    assert ids.shape == (1, 35)
    assert streamer.got == [*ids[0].tolist(), "end"]


class Sizes(StoppingCriteria):
    """Never stops; notes what is held after each token."""

    def __init__(self, cache):
        self.cache, self.found = cache, set()

    def __call__(self, input_ids, scores, **kwargs):
        strips = tuple(layer.keys.shape for layer in self.cache.groups[0].cache.kept)
        self.found.add((self.cache.held, self.cache.nbytes, strips))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def assert_endless(new: int) -> None:
    model = tiny.ROTARY["llama"](num_hidden_layers=1)
    past = SinkCache(model, **SIZES)
    sizes = Sizes(past)
    settings = {"do_sample": True, "eos_token_id": None, "past_key_values": past, "stopping_criteria": [sizes]}
    ids = model.generate(tiny.tokens(30)[None], max_new_tokens=new, **settings)[0]
    assert (ids.shape, past.seen) == ((30 + new,), 30 + new - 1)
    ((held, nbytes, _),) = sizes.found
    assert (held, nbytes) == (16, 2 * 4 * 16 * 2 * 16)  # keys and values, float32, entries, heads, features
    # one layer's keys depend on their own token only: the end of the text follows from sinks and window alone
    spliced = torch.cat((ids[:SINKS], ids[-RECENT - 41 :]))
    after = model(ids[None, -1:], past_key_values=past).logits[0, -1]
    with attention_sinks(model, **SIZES):
        assert (model(spliced[None]).logits[0, -1] - after).abs().max() < 2e-4


def test_two_thousand_tokens_in_constant_memory():
    assert_endless(2000)


@pytest.mark.slow
def test_ten_thousand_tokens_in_constant_memory():
    assert_endless(10_500)


# Conversations


@some_families
def test_a_conversation_goes_on_from_the_returned_cache(family):
    model, prompt, said = model_of(family), tiny.tokens(30), tiny.tokens(9, seed=2)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, **GREEDY}
    with attention_sinks(model, **SIZES):
        first = model.generate(prompt[None], **settings)
        talk = torch.cat((first.sequences, said[None]), dim=1)
        second = model.generate(talk, past_key_values=first.past_key_values, **settings)
        assert second.past_key_values is first.past_key_values
        assert torch.equal(second.sequences, model.generate(talk, **settings).sequences)
        more = torch.cat((second.sequences, said[None]), dim=1)
        third = model.generate(more, past_key_values=second.past_key_values, **settings)
        assert torch.equal(third.sequences, model.generate(more, **settings).sequences)


def test_only_the_new_tokens_of_a_conversation_may_be_passed(llama):
    prompt, settings = tiny.tokens(30)[None], {"max_new_tokens": 6, "return_dict_in_generate": True, **GREEDY}
    first = llama.generate(prompt, **settings)
    talk = torch.cat((first.sequences, tiny.tokens(9, seed=2)[None]), dim=1)
    new = talk[:, first.past_key_values.get_seq_length() :]
    second = llama.generate(
        new, attention_mask=torch.ones_like(talk), past_key_values=first.past_key_values, **settings
    )
    assert torch.equal(second.sequences[:, -6:], llama.generate(talk, **settings).sequences[:, -6:])


def test_a_conversation_that_the_cache_has_seen_already_is_an_error(llama):
    prompt = tiny.tokens(30)[None]
    past = llama.generate(prompt, max_new_tokens=6, return_dict_in_generate=True, **GREEDY).past_key_values
    with pytest.raises(UserError, match=r"cache has seen 35 tokens.*whole conversation"):
        llama.generate(prompt, past_key_values=past, max_new_tokens=6)


# Batches


@some_families
def test_rows_of_a_padded_batch_get_what_they_get_alone(family):
    rows = tiny.tokens(40), tiny.tokens(2, seed=1), tiny.tokens(18, seed=2), tiny.tokens(18, seed=3)
    model = model_of(family)
    with attention_sinks(model, **SIZES):
        together = model.generate(**padded(*rows), max_new_tokens=20, **GREEDY)
        logits = model(**padded(*rows)).logits
        for i, row in enumerate(rows):
            alone = model.generate(row[None], max_new_tokens=20, **GREEDY)
            assert torch.equal(together[i, 40 - len(row) :], alone[0])
            assert (logits[i, 40 - len(row) :] - model(row[None]).logits[0]).abs().max() < 2e-4
            assert not logits[i, : 40 - len(row)].any()


def test_a_padded_conversation_goes_on(llama):
    rows, more = (tiny.tokens(30), tiny.tokens(11, seed=1)), (tiny.tokens(8, seed=2), tiny.tokens(3, seed=3))
    batch, settings = padded(*rows), {"max_new_tokens": 5, "return_dict_in_generate": True, **GREEDY}
    first = llama.generate(**batch, **settings)
    added = padded(*more)
    ids = torch.cat((first.sequences, added["input_ids"]), dim=1)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 5, dtype=torch.long), added["attention_mask"]), dim=1)
    second = llama.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **settings)
    for i, said in enumerate(more):
        alone = llama.generate(torch.cat((first.sequences[i][mask[i, :35].bool()], said))[None], **settings)
        assert torch.equal(second.sequences[i, -5:], alone.sequences[0, -5:])


def test_rows_of_equal_length_share_their_forwards(llama):
    calls = []
    hook = llama.model.layers[0].register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    llama.generate(torch.stack([tiny.tokens(30, seed=i) for i in range(3)]), max_new_tokens=4, **GREEDY)
    hook.remove()
    assert calls.count(3) == 4


def test_a_cache_refuses_a_batch_of_another_size(llama):
    past = llama(tiny.tokens(30).view(2, 15)).past_key_values
    with pytest.raises(UserError, match="cache of 2 rows was given a batch of 3"):
        llama(tiny.tokens(3)[:, None], past_key_values=past)


# On and off


def test_nothing_stays_on_the_model():
    model = tiny.ROTARY["llama"]()
    before, plain = state(model), nlls(model, tiny.tokens(50))
    kind = {name: getattr(type(model), name) for name in METHODS}
    with attention_sinks(model, **SIZES):
        assert set(vars(model)) - set(before) == set(METHODS)
        assert (nlls(model, tiny.tokens(50)) - plain).abs().max() > 0.1
    assert state(model) == before
    with pytest.raises(ZeroDivisionError), attention_sinks(model, **SIZES):
        model.generate(tiny.tokens(30)[None], max_new_tokens=2)
        raise ZeroDivisionError
    assert state(model) == before
    assert torch.equal(nlls(model, tiny.tokens(50)), plain)
    assert kind == {name: getattr(type(model), name) for name in METHODS}


def test_a_cache_object_gives_a_loaded_model_the_strategy_as_long_as_it_lives():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    before, plain, expected = state(model), nlls(model, stream), benchmark(model, stream)
    cache = SinkCache(model, **SIZES)
    assert (nlls(model, stream, past_key_values=cache) - expected).abs().max() < 2e-4
    assert torch.equal(nlls(model, stream), plain)  # other calls are not touched
    assert cache.seen == 49
    cache.reset()
    assert (nlls(model, stream, past_key_values=cache) - expected).abs().max() < 2e-4
    del cache
    gc.collect()
    assert state(model) == before


def test_generate_takes_the_cache_object():
    model, prompt = tiny.ROTARY["gpt_neox"](), tiny.tokens(30)[None]
    made = model.generate(prompt, past_key_values=SinkCache(model, **SIZES), max_new_tokens=15, **GREEDY)
    with attention_sinks(model, **SIZES):
        assert torch.equal(model.generate(prompt, max_new_tokens=15, **GREEDY), made)


def test_contexts_nest_and_caches_outlive_them_only_to_say_so():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    before = state(model)
    with attention_sinks(model, attention_sink_size=0, attention_sink_window_size=16):
        windowed = nlls(model, stream)
        with attention_sinks(model, **SIZES):
            past = model(stream[None]).past_key_values
            assert (nlls(model, stream) - windowed).abs().max() > 0.1
        assert torch.equal(nlls(model, stream), windowed)
    assert state(model) == before
    with pytest.raises(UserError, match="within `with attention_sinks"):
        model(stream[None, :1], past_key_values=past)


def test_two_models_with_different_strategies_side_by_side():
    folder, stream = str(GOLDEN / "llama"), tiny.tokens(50)
    narrow = sinkbench.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **SIZES)
    wide = sinkbench.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attention_sink_size=1, attention_sink_window_size=30
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for _ in range(2):
        assert (nlls(narrow, stream) - benchmark(plain, stream)).abs().max() < 2e-4
        assert (nlls(wide, stream) - benchmark(plain, stream, 1, 30)).abs().max() < 2e-4
    assert not set(vars(plain)) & set(METHODS)


def test_the_benchmark_runs_on_a_model_that_carries_another_strategy(llama):
    stream = tiny.tokens(50)
    before = benchmark(tiny.STREAMABLE["llama"](), stream, 1, 20)
    assert torch.equal(benchmark(llama, stream, 1, 20), before)


# Loading


def test_what_is_loaded_is_a_model_of_transformers():
    folder = str(GOLDEN / "llama")
    model = sinkbench.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert inspect.signature(model.forward) == inspect.signature(transformers.LlamaForCausalLM.forward.__get__(model))
    assert model(tiny.tokens(5)[None]).past_key_values.keep == Keep(4, 1020)
    body = sinkbench.AutoModel.from_pretrained(folder, dtype=torch.float32, **SIZES)
    assert type(body) is transformers.LlamaModel
    stream, head = tiny.tokens(50), sinkbench.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **SIZES)
    assert torch.allclose(head.lm_head(body(stream[None]).last_hidden_state), head(stream[None]).logits, atol=1e-4)


def test_other_arguments_and_their_errors_are_those_of_transformers():
    folder = str(GOLDEN / "llama")
    loaded, info = sinkbench.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert set(vars(loaded)) >= set(METHODS)
    assert not info["missing_keys"]
    with pytest.raises(OSError, match="nowhere"):
        sinkbench.AutoModelForCausalLM.from_pretrained("./nowhere")


def test_missing_weights_are_refused_unless_the_caller_asks_to_be_told(tmp_path):
    model = copy.deepcopy(model_of("llama"))
    lost = "model.layers.1.mlp.up_proj.weight"
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k != lost})
    with pytest.raises(UserError, match=f"lacks {lost}, which would be random"):
        sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **SIZES)
    loaded, info = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **SIZES)
    assert set(info["missing_keys"]) == {lost}
    assert set(vars(loaded)) >= set(METHODS)


def test_another_shape_is_accepted_where_the_caller_allows_it(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    changes = {"vocab_size": tiny.VOCABULARY + 8, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match="size"):
        sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    larger = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes)
    assert larger.lm_head.weight.shape[0] == tiny.VOCABULARY + 8


def test_architecture_classes_are_where_people_expect_them():
    for name in ("Llama", "Falcon", "Mistral", "GPTNeoX", "Mpt", "GPTJ", "Qwen2", "Qwen3", "StableLm", "Phi", "Gemma"):
        assert getattr(sinkbench, f"{name}ForCausalLM").of is getattr(transformers, f"{name}ForCausalLM")
        assert getattr(sinkbench, f"{name}Model").of is getattr(transformers, f"{name}Model")
    config = model_of("llama").config
    assert isinstance(sinkbench.LlamaForCausalLM(config, **SIZES), transformers.LlamaForCausalLM)
    assert set(vars(sinkbench.AutoModelForCausalLM.from_config(config))) >= set(METHODS)
    for name in ("NoSuchForCausalLM", "BertTokenizer", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(sinkbench, name)


def test_importing_sinkbench_does_not_import_torch():
    code = "import sys, sinkbench, sinkbench.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_copied_or_saved_model_stands_on_its_own(tmp_path: Path):
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(50)
    with attention_sinks(model, **SIZES):
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        expected = nlls(model, stream)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (nlls(twin, stream) - expected).abs().max() < 2e-4
    loaded = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **SIZES)
    assert (nlls(loaded, stream) - expected).abs().max() < 2e-4


def test_training_is_transformers_own_and_a_cache_in_use_carries_no_gradient(llama):
    stream = tiny.tokens(50)[None]
    assert not llama(stream).logits.requires_grad
    llama.train()
    outputs = llama(stream, labels=stream)
    llama.eval()
    assert outputs.loss.requires_grad
    with torch.inference_mode():
        past = llama(stream).past_key_values
    llama(stream[:, :1], past_key_values=past)


# Errors


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted generation does not work with attention sinks"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search does not work with attention sinks"),
        ({"dola_layers": "high"}, "dola generation does not work with attention sinks"),
        ({"cache_implementation": "static"}, "cache_implementation='static' does not go with attention sinks"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized' does not go"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8 does not go with attention sinks"),
        ({"attention_mask": torch.tensor([[1] * 29 + [0]])}, "padding must be on the left"),
    ],
)
def test_what_cannot_work_is_a_clear_error(llama, asked, told):
    with pytest.raises(UserError, match=told):
        llama.generate(tiny.tokens(30)[None], max_new_tokens=3, **asked)


def test_an_assistant_model_is_a_clear_error(llama):
    with pytest.raises(UserError, match="assisted generation does not work"):
        llama.generate(tiny.tokens(30)[None], assistant_model=model_of("mistral"), max_new_tokens=3)


def test_without_a_cache_generate_is_transformers_own(llama):
    dense = llama.generate(tiny.tokens(30)[None], use_cache=False, max_new_tokens=3, **GREEDY)
    plain = tiny.STREAMABLE["llama"]()
    assert torch.equal(plain.generate(tiny.tokens(30)[None], max_new_tokens=3, **GREEDY), dense)


@pytest.mark.parametrize("family", tiny.LEARNED)
def test_models_that_cannot_stream_are_refused_when_they_are_given_the_strategy(family):
    model = tiny.LEARNED[family]()
    before = state(model)
    with pytest.raises(UserError, match="learns absolute positions"), attention_sinks(model):
        pass
    with pytest.raises(UserError, match="learns absolute positions"):
        SinkCache(model)
    gc.collect()
    assert state(model) == before


@pytest.mark.parametrize("sizes", [(-1, 10), (4, 0), (4, 1.5), (True, 10), ("4", 10)])
def test_sizes_that_cannot_be(sizes):
    with pytest.raises(UserError, match=r"attention_sink_(window_)?size must be a whole number"):
        SinkCache(model_of("llama"), *sizes)


def test_caches_of_others_are_refused(llama):
    stream = tiny.tokens(30)[None]
    with pytest.raises(UserError, match="made for another model"):
        llama(stream, past_key_values=SinkCache(tiny.ROTARY["llama"](), **SIZES))
    theirs = transformers.DynamicCache()
    theirs.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(UserError, match="DynamicCache cannot keep"):
        llama(stream, past_key_values=theirs)
    with pytest.raises(UserError, match="call the model itself"):
        llama.model(stream, past_key_values=SinkCache(llama, **SIZES))
    with pytest.raises(UserError, match="does not go with 1 rows of 30 tokens"):
        llama(stream, attention_mask=torch.ones(1, 20))
    with pytest.raises(UserError, match="input_ids or inputs_embeds"):
        read(llama, llama.forward, SinkCache(llama), {})
