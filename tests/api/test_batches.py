"""Rows of a batch, padded or not, get what they get alone."""

import pytest
import tiny
import torch
from dropin import GREEDY, SIZES, padded, some_families

from sinkbench import attention_sinks
from sinkbench.errors import UserError


@some_families
def test_rows_of_a_padded_batch_get_what_they_get_alone(family):
    rows = tiny.tokens(40), tiny.tokens(2, seed=1), tiny.tokens(18, seed=2), tiny.tokens(18, seed=3)
    model = tiny.shared(family)
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
