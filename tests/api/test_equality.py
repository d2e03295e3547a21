"""The drop-in classes compute what the benchmark and the oracle do, however the prompt is cut."""

import pytest
import tiny
import torch
from dropin import GREEDY, RECENT, SINKS, SIZES, benchmark, every_family, nlls, some_families
from oracle import oracle_logits
from torch.nn.functional import cross_entropy

from sinkbench import SinkCache, attention_sinks


@every_family
def test_generated_tokens_are_those_of_the_oracle(family):
    model, prompt = tiny.shared(family), tiny.tokens(22)
    with attention_sinks(model, **SIZES):
        ids = model.generate(prompt[None], max_new_tokens=8, **GREEDY)[0]
    chosen = [int(x.argmax()) for x in oracle_logits(model, ids, SINKS + RECENT, SINKS)]
    assert ids[22:].tolist() == chosen[21:]


@every_family
def test_forward_answers_as_the_benchmark(family):
    model, stream = tiny.shared(family), tiny.tokens(50)
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
    model, prompt, rest = tiny.shared(family), tiny.tokens(40), tiny.tokens(12, seed=1)
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
    monkeypatch.setattr("sinkbench.api.forward.chunk_for", lambda *asked: 7)
    assert (nlls(llama, stream) - whole).abs().max() < 2e-4
    outputs = llama(stream[None], output_hidden_states=True, logits_to_keep=10)
    assert outputs.logits.shape == (1, 10, tiny.VOCABULARY)
    assert [tuple(x.shape) for x in outputs.hidden_states] == [(1, 60, 64)] * 3


def test_loss_is_that_of_the_labels(llama):
    stream = tiny.tokens(50)
    outputs = llama(stream[None], labels=stream[None])
    assert outputs.loss == pytest.approx(float(benchmark(tiny.shared("llama"), stream).mean()), abs=1e-4)
    assert llama(stream[None], labels=stream[None], return_dict=False)[0] == outputs.loss


def test_inputs_may_be_embeddings(llama):
    prompt = tiny.tokens(30)[None]
    embedded = llama.get_input_embeddings()(prompt)
    assert torch.allclose(llama(inputs_embeds=embedded).logits, llama(prompt).logits, atol=1e-5)
    ids = llama.generate(prompt, max_new_tokens=6, **GREEDY)
    assert torch.equal(llama.generate(inputs_embeds=embedded, max_new_tokens=6, **GREEDY), ids[:, 30:])
