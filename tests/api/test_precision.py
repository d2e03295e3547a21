"""Mixed precision: under autocast, prepared by Accelerate, in a Trainer; and what of it stays."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from dropin import GREEDY, SIZES, benchmark, nlls, some_families
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import sinkbench
from sinkbench import attention_sinks

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@pytest.fixture
def carrying(tmp_path):
    """Models that carry the strategy for good."""

    def load(family="llama"):
        tiny.shared(family).save_pretrained(tmp_path / family)
        return sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32, **SIZES)

    return load


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some_families
def test_a_prompt_longer_than_the_cache_under_autocast(family, dtype, device):
    model, stream = tiny.STREAMABLE[family]().to(device), tiny.tokens(60).to(device)
    wanted = benchmark(model, stream)
    with attention_sinks(model, **SIZES), torch.autocast(device, dtype):
        outputs = model(stream[None, :-1])
        got = cross_entropy(outputs.logits[0].float(), stream[1:], reduction="none").cpu()
        one_by_one = [model(stream[None, :1]).past_key_values]
        for t in range(1, 59):
            one_by_one.append(model(stream[None, t : t + 1], past_key_values=one_by_one[0]).logits[0])
        model.generate(stream[None], max_new_tokens=3, **GREEDY)
    steps = cross_entropy(torch.cat(one_by_one[1:]).float(), stream[2:], reduction="none").cpu()
    for part, of in ((got, wanted), (steps, wanted[1:])):  # random weights are wide: single tokens may differ by more
        assert (part - of).abs().median() < 0.3
        assert float(part.mean()) == pytest.approx(float(of.mean()), abs=0.25)


@pytest.mark.parametrize("family", ["llama", "gptj", "mpt"])
def test_a_cache_passes_from_autocast_to_full_precision_and_back(family):
    model, stream = tiny.STREAMABLE[family](), tiny.tokens(60)
    with attention_sinks(model, **SIZES):
        with torch.autocast("cpu", torch.bfloat16):
            past = model(stream[None, :30]).past_key_values
            low = past.nbytes
        model(stream[None, 30:31], past_key_values=past)
        model(stream[None, 31:50], past_key_values=past)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(stream[None, 50:], past_key_values=past).logits
        assert logits.isfinite().all()
        assert 2 * low == model(stream[None, :30]).past_key_values.nbytes


@devices
def test_a_model_prepared_by_accelerate_leaves_autocast_as_it_was(carrying, device):
    model, other = carrying(), tiny.ROTARY["qwen2"]().to(device)
    prepared = _accelerator(device).prepare(model)
    stream = tiny.tokens(60).to(device)[None]
    with torch.no_grad():
        for n in (5, 60):
            prepared(stream[:, :n])
            assert not torch.is_autocast_enabled(device)
            assert other(stream).logits.dtype == torch.float32
        prepared.generate(stream, max_new_tokens=3, **GREEDY)
        assert not torch.is_autocast_enabled(device)


def _accelerator(device):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="bf16", cpu=device == "cpu")


def test_a_prepared_model_can_be_given_the_strategy_and_can_be_unwrapped():
    model, stream = tiny.ROTARY["llama"](), tiny.tokens(60)
    accelerator = _accelerator("cpu")
    prepared, wanted = accelerator.prepare(model), benchmark(tiny.ROTARY["llama"](), stream)
    with attention_sinks(prepared, **SIZES):
        assert (nlls(prepared, stream).detach() - wanted).abs().median() < 0.3
    with torch.no_grad():
        assert prepared(stream[None]).past_key_values.get_seq_length() == 60
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    with torch.no_grad(), attention_sinks(model, **SIZES):
        assert (nlls(model, stream) - wanted).abs().max() < 2e-4


class Lines(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = tiny.tokens(40, seed=i)
        return {"input_ids": ids, "labels": ids}


def test_a_trainer_with_bf16_trains_and_evaluates_with_the_strategy(carrying, tmp_path):
    model = carrying()
    wanted = torch.cat([benchmark(model, Lines()[i]["input_ids"]) for i in range(4)]).mean()
    arguments = TrainingArguments(
        *(str(tmp_path / "out"),), bf16=True, use_cpu=True, max_steps=2, learning_rate=1e-9, report_to=[],
        per_device_train_batch_size=2, per_device_eval_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Lines(), eval_dataset=Lines())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before == pytest.approx(float(wanted), abs=0.1)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(before, abs=0.02)
    assert trainer.predict(Lines()).predictions.shape == (4, 40, tiny.VOCABULARY)
    assert not torch.is_autocast_enabled("cpu")
