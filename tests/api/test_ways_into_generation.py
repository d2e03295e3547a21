"""Every way into transformers' generation keeps what the strategy says, or is refused in one line."""

import accelerate
import pytest
import tiny
import torch
import transformers
from dropin import GREEDY, SIZES
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    StaticCache,
    pipeline,
)
from transformers.generation.continuous_batching import ContinuousBatchingManager, PagedAttentionCache

import sinkbench
from sinkbench import attention_sinks
from sinkbench.errors import UserError

ASKED = {"max_new_tokens": 6, **GREEDY}
families = pytest.mark.parametrize("family", ["llama", "gptj", "gpt_neox", "mpt"])


@pytest.fixture
def prompt():
    return tiny.tokens(60)[None]


@pytest.fixture
def wanted(prompt):
    """What comes behind the prompt with attention sinks; without, it is something else."""
    model = tiny.ROTARY["llama"]()
    with attention_sinks(model, **SIZES):
        made = model.generate(prompt, **ASKED)
    assert not torch.equal(made, model.generate(prompt, **ASKED))
    return made


@pytest.mark.parametrize(
    "enter",
    [
        lambda model, ids: model.init_continuous_batching(),
        lambda model, ids: model.generate_batch(ids.tolist(), generation_config=GenerationConfig(max_new_tokens=3)),
        lambda model, ids: model.continuous_batching_context_manager().__enter__(),
        lambda model, ids: _manager(model),
        lambda model, ids: model.set_attn_implementation("paged|sdpa"),
    ],
)
def test_continuous_batching_is_refused(llama, prompt, enter):
    with pytest.raises(UserError, match="no strategy: use generate with a padded batch") as said:
        enter(llama, prompt)
    assert "\n" not in str(said.value)
    assert "paged" not in llama.config._attn_implementation


def _manager(model):
    return ContinuousBatchingManager(model, GenerationConfig(max_new_tokens=3), ContinuousBatchingConfig())


def test_a_manager_that_was_there_first_is_refused(prompt):
    model = tiny.ROTARY["llama"]()
    _manager(model)
    with pytest.raises(UserError, match="no strategy: use generate"):
        sinkbench.SinkCache(model)
    model.set_attn_implementation("sdpa")
    with attention_sinks(model, **SIZES), pytest.raises(UserError, match="no strategy: use generate"):
        model(prompt, cache=object.__new__(PagedAttentionCache), use_cache=False)  # as a manager calls it


def test_continuous_batching_of_a_model_without_a_strategy_is_transformers_own():
    model = tiny.ROTARY["llama"]()
    cache = sinkbench.SinkCache(model)
    assert type(model.init_continuous_batching()).__name__ == "ContinuousBatchingManager"
    del cache


@pytest.mark.parametrize(
    "asked",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "paged"},
        {"cache_implementation": "offloaded"},
        {"generation_config": GenerationConfig(cache_implementation="static", **ASKED)},
        {"generation_config": GenerationConfig(prefill_chunk_size=8, **ASKED)},
        {"past_key_values": "static"},
    ],
)
def test_other_caches_are_refused(llama, prompt, asked):
    if asked.get("past_key_values"):
        asked = {"past_key_values": StaticCache(config=llama.config, max_cache_len=100)}
    with pytest.raises(UserError, match=r"attention.sink"):
        llama.generate(prompt, **asked | ({} if "generation_config" in asked else ASKED))


@pytest.mark.parametrize(
    "generate",
    [
        lambda model, ids: model.generate(ids, **ASKED),
        lambda model, ids: model.generate(ids, GenerationConfig(**ASKED)),
        lambda model, ids: model.generate(ids, generation_config=GenerationConfig(**ASKED)),
        lambda model, ids: model.generate(ids, cache_implementation="dynamic", **ASKED),
        lambda model, ids: model.generate(ids, past_key_values=DynamicCache(config=model.config), **ASKED),
        lambda model, ids: model.generate(ids, compile_config=CompileConfig(), **ASKED),
        lambda model, ids: model.generate(ids, custom_generate=_one_by_one, **ASKED),
        lambda model, ids: type(model).generate(model, ids, **ASKED),
        lambda model, ids: torch.compile(model).generate(ids, **ASKED),
    ],
)
def test_all_others_follow_the_strategy(llama, prompt, wanted, generate):
    assert torch.equal(generate(llama, prompt), wanted)


def _one_by_one(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
    """A way of generating that somebody else wrote."""
    kwargs["past_key_values"], n = None, 0
    while not n or input_ids.shape[1] < generation_config.max_length:
        out = model(input_ids[:, n:], past_key_values=kwargs["past_key_values"], use_cache=True)
        kwargs["past_key_values"], n = out.past_key_values, input_ids.shape[1]
        input_ids = torch.cat((input_ids, out.logits[:, -1:].argmax(-1)), 1)
    return input_ids


def test_guidance_has_two_texts_under_the_strategy(llama, prompt):
    first = llama.generate(prompt, guidance_scale=1.5, **ASKED)
    assert first.shape == (1, 66)
    assert torch.equal(first, llama.generate(prompt, guidance_scale=1.5, **ASKED))


# Whether there is a cache at all


@families
def test_a_generation_config_alone_warns_of_nothing_and_keeps_the_strategy(family, prompt, recwarn, caplog):
    model = tiny.STREAMABLE[family]()
    with attention_sinks(model, **SIZES):
        wanted = model.generate(prompt, **ASKED)
        settings = GenerationConfig(**ASKED, pad_token_id=0)
        caplog.clear()
        recwarn.clear()
        assert torch.equal(model.generate(prompt, generation_config=settings), wanted)
        assert torch.equal(model.generate(prompt, settings), wanted)
    assert not list(recwarn)
    assert not [record for record in caplog.records if "generation" in record.message]
    assert settings.use_cache is None


@families
def test_no_cache_in_a_configuration_counts(family, prompt):
    model = tiny.STREAMABLE[family]()
    dense = model.generate(prompt, **ASKED)
    with attention_sinks(model, **SIZES):
        cut = model.generate(prompt, **ASKED)
        assert not torch.equal(cut, dense)
        assert torch.equal(model.generate(prompt, GenerationConfig(use_cache=False, **ASKED)), dense)
        if not family.startswith("mpt"):  # whose configurations say so unless told otherwise
            model.generation_config.use_cache = model.config.use_cache = False
            assert torch.equal(model.generate(prompt, **ASKED), dense)
            with torch.no_grad():
                assert model(prompt).past_key_values is None
                assert model(prompt, use_cache=True).past_key_values.held == 16
        assert torch.equal(model.generate(prompt, use_cache=True, **ASKED), cut)


@families
@pytest.mark.parametrize("first", ["strategy", "offload"])
def test_offloaded_weights(family, first, prompt):
    model = tiny.STREAMABLE[family]()
    with attention_sinks(model, **SIZES):
        wanted = model.generate(prompt, **ASKED)
        if first == "strategy":
            accelerate.cpu_offload(model, execution_device="cpu")
            assert torch.equal(model.generate(prompt, **ASKED), wanted)
    dense = tiny.STREAMABLE[family]().generate(prompt, **ASKED)
    if first == "offload":
        accelerate.cpu_offload(model, execution_device="cpu")
        with attention_sinks(model, **SIZES):
            assert torch.equal(model.generate(prompt, **ASKED), wanted)
    assert torch.equal(model.generate(prompt, **ASKED), dense)


@pytest.mark.heavy
@pytest.mark.parametrize("strict", [False, True])
def test_a_forward_without_a_cache_is_exported_as_the_plain_model_is(strict, prompt):
    model = tiny.ROTARY["llama"]()
    with attention_sinks(model, **SIZES), torch.no_grad():
        exported = torch.export.export(model, (prompt,), kwargs={"use_cache": False}, strict=strict)
        assert torch.allclose(
            exported.module()(prompt, use_cache=False).logits, model(prompt, use_cache=False).logits, atol=1e-5
        )


# Names


def test_what_attention_sinks_exported_can_be_imported():
    kinds = ["CausalLM", "QuestionAnswering", "SequenceClassification", "TokenClassification"]
    names = {f"{model}For{kind}" for model in ("AutoModel", "Falcon", "GPTNeoX", "Mpt") for kind in kinds}
    names |= {f"{model}Model" for model in ("Auto", "Falcon", "GPTJ", "GPTNeoX", "Llama", "Mistral", "Mpt")}
    names |= {f"{model}PreTrainedModel" for model in ("Falcon", "GPTJ", "GPTNeoX", "Mpt")}
    names |= {f"{model}For{kind}" for model in ("GPTJ", "Llama", "Mistral") for kind in (kinds[0], kinds[2])}
    for name in names | {"AutoTokenizer", "AttentionSinkKVCache", "GPTJForQuestionAnswering"}:
        assert getattr(sinkbench, name).__name__ == name
    for name in ("LlamaForSequenceClassification", "AutoModelForQuestionAnswering"):
        with pytest.raises(UserError, match=f"use transformers.{name}"):
            getattr(sinkbench, name).from_pretrained("anything")
    with pytest.raises(UserError, match=r"sinkbench.SinkCache\(model\)"):
        sinkbench.AttentionSinkKVCache()


def test_instances_are_those_of_transformers_and_classes_are_not_to_be_derived_from():
    model = sinkbench.LlamaForCausalLM(tiny.shared("llama").config, **SIZES)
    assert isinstance(model, sinkbench.LlamaForCausalLM)
    assert not isinstance(model, sinkbench.MistralForCausalLM)
    assert issubclass(transformers.LlamaForCausalLM, sinkbench.LlamaForCausalLM)
    assert issubclass(sinkbench.LlamaForCausalLM, transformers.PreTrainedModel) is False
    with pytest.raises(UserError, match=r"derive from transformers\.LlamaForCausalLM"):

        class Mine(sinkbench.LlamaForCausalLM):
            pass


@pytest.mark.heavy
def test_the_embedded_model_goes_by_its_name_and_ends_its_texts():
    tokenizer = sinkbench.AutoTokenizer.from_pretrained("smollm2-135m")
    model = sinkbench.AutoModelForCausalLM.from_pretrained("smollm2-135m", attention_sink_window_size=60)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>",
    )  # fmt: skip
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    chat = [{"role": "user", "content": "Answer with yes or no: is fire hot?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    assert made[0, -1] == tokenizer.eos_token_id
    assert made.shape[1] < inputs["input_ids"].shape[1] + 60


@pytest.mark.heavy
def test_a_pipeline_follows_the_strategy():
    tokenizer = sinkbench.AutoTokenizer.from_pretrained("smollm2-135m")
    model = sinkbench.AutoModelForCausalLM.from_pretrained("smollm2-135m", attention_sink_window_size=12)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void;"
    inputs = tokenizer(text, return_tensors="pt")
    wanted = tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)
    assert writer(text, max_new_tokens=8, do_sample=False)[0]["generated_text"] == wanted
