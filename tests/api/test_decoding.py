"""Sampling, beams, streamers and stopping criteria of transformers over a cut cache, and text without end."""

import pytest
import tiny
import torch
from dropin import GREEDY, RECENT, SINKS, SIZES, nlls, padded
from transformers import StoppingCriteria, TextStreamer

from sinkbench import SinkCache, attention_sinks


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


@pytest.mark.heavy
def test_ten_thousand_tokens_in_constant_memory():
    assert_endless(10_500)
