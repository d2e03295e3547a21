"""What differs on CUDA: copies that go through a file, offloaded weights, the model moved, batches, the library.

Threads are in ``test_threads.py``, mixed precision in ``test_precision.py``.
"""

import copy
import io

import accelerate
import pytest
import tiny
import torch
from dropin import GREEDY, SIZES, benchmark, nlls, padded

import sinkbench
from sinkbench import attention_sinks
from sinkbench.errors import UserError

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
ASKED = {"max_new_tokens": 8, **GREEDY}
FAMILIES = ["llama", "gpt_neox", "gptj", "mpt", "gemma2"]
families = pytest.mark.parametrize("family", FAMILIES)
with_a_state = pytest.mark.parametrize("family", [*FAMILIES, "qwen3_next"])


@with_a_state
def test_copies_and_pickled_caches_go_on(family):
    model, stream = tiny.STREAMABLE[family]().to(DEVICE), tiny.tokens(80).to(DEVICE)[None]
    with attention_sinks(model, **SIZES), torch.no_grad():
        past, file = model(stream[:, :50]).past_key_values, io.BytesIO()
        torch.save(past, file)
        file.seek(0)
        twins = [copy.deepcopy(past), torch.load(file, weights_only=False)]
        wanted = model(stream[:, 50:], past_key_values=past).logits
        for twin in twins:
            assert (model(stream[:, 50:], past_key_values=twin).logits - wanted).abs().max() < 1e-4
        file.seek(0)
        elsewhere = torch.load(file, weights_only=False, map_location=DEVICE)
    with pytest.raises(UserError, match=f"lies on {DEVICE}"):
        elsewhere.attach(tiny.STREAMABLE[family]())


@with_a_state
def test_a_model_that_moves_is_read_again(family):
    model, stream = tiny.STREAMABLE[family](), tiny.tokens(60)
    with attention_sinks(model, **SIZES):
        here = nlls(model, stream)
        model.to(DEVICE)
        there = nlls(model, stream.to(DEVICE)).cpu()
    assert (here - there).abs().max() < 1e-3
    assert (here - benchmark(model.cpu(), stream)).abs().max() < 1e-3


@with_a_state
def test_weights_that_are_offloaded_from_cuda(family):
    model, prompt = tiny.STREAMABLE[family](), tiny.tokens(60).to(DEVICE)[None]
    with attention_sinks(model.to(DEVICE), **SIZES):
        wanted = model.generate(prompt, **ASKED)
    accelerate.cpu_offload(model.cpu(), execution_device=DEVICE)
    with attention_sinks(model, **SIZES):
        assert torch.equal(model.generate(prompt, **ASKED), wanted)


@families
def test_what_is_generated_past_the_window_is_what_the_benchmark_finds_likeliest(family):
    model, prompt = tiny.STREAMABLE[family]().to(DEVICE), tiny.tokens(20).to(DEVICE)[None]
    with attention_sinks(model, **SIZES):
        text = model.generate(prompt, max_new_tokens=40, **GREEDY)[0]
        logits = model(text[None, :-1]).logits[0]
        assert (nlls(model, text).cpu() - benchmark(model, text)).abs().max() < 1e-3
    said = text[20:]
    chosen = logits[-len(said) :].gather(-1, said[:, None])[:, 0]
    assert (logits[-len(said) :].amax(-1) - chosen).max() < 1e-3


@families
def test_rows_of_a_padded_batch_get_what_they_get_alone(family):
    rows = [tiny.tokens(n, seed=n).to(DEVICE) for n in (40, 2, 18)]
    model = tiny.STREAMABLE[family]().to(DEVICE)
    batch = {name: value.to(DEVICE) for name, value in padded(*rows).items()}
    with attention_sinks(model, **SIZES), torch.no_grad():
        together, logits = model.generate(**batch, **ASKED), model(**batch).logits
        for i, row in enumerate(rows):
            assert torch.equal(together[i, 40 - len(row) :], model.generate(row[None], **ASKED)[0])
            assert (logits[i, 40 - len(row) :] - model(row[None]).logits[0]).abs().max() < 1e-3


@families
@pytest.mark.parametrize("engine", ["stepwise", "parallel"])
def test_a_model_at_hand_is_run_where_it_lies(family, engine, tmp_path):
    stream, found = tiny.tokens(50).tolist(), []
    for device in ("cpu", DEVICE):
        run = sinkbench.run(
            model_name_or_path=tiny.STREAMABLE[family]().to(device),
            dataset_name=stream,
            window_size=16,
            num_tokens=40,
            engine=engine,
            cuda_graphs=False,
            output_dir=tmp_path / f"{len(found)}",
        )
        found.append(torch.tensor(run.frame.nll.to_numpy()))
    assert len(found[0]) == 40
    assert (found[0] - found[1]).abs().max() < 1e-3
