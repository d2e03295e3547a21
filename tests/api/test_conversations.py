"""A conversation goes on from the cache that the last answer left."""

import pytest
import tiny
import torch
from dropin import GREEDY, SIZES, some_families

from sinkbench import attention_sinks
from sinkbench.errors import UserError


@some_families
def test_a_conversation_goes_on_from_the_returned_cache(family):
    model, prompt, said = tiny.shared(family), tiny.tokens(30), tiny.tokens(9, seed=2)
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
