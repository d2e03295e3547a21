"""The classes of transformers under their own names: what ``from_pretrained`` gives, and what it refuses."""

import copy
import inspect
import subprocess
import sys

import pytest
import tiny
import torch
import transformers
from dropin import METHODS, SIZES
from golden import GOLDEN

import sinkbench
from sinkbench.errors import UserError


def test_what_is_loaded_is_a_model_of_transformers():
    folder = str(GOLDEN / "llama")
    model = sinkbench.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == torch.bfloat16
    assert inspect.signature(model.forward) == inspect.signature(transformers.LlamaForCausalLM.forward.__get__(model))
    assert model(tiny.tokens(5)[None]).past_key_values.plan == tiny.plan(model, "attention_sinks", 1024, 4)
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
    model = copy.deepcopy(tiny.shared("llama"))
    lost = "model.layers.1.mlp.up_proj.weight"
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in model.state_dict().items() if k != lost})
    with pytest.raises(UserError, match=f"lacks {lost}, which would be random"):
        sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **SIZES)
    loaded, info = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **SIZES)
    assert set(info["missing_keys"]) == {lost}
    assert set(vars(loaded)) >= set(METHODS)


def test_another_shape_is_accepted_where_the_caller_allows_it(tmp_path):
    tiny.shared("llama").save_pretrained(tmp_path)
    changes = {"vocab_size": tiny.VOCABULARY + 8, "dtype": torch.float32}
    with pytest.raises(RuntimeError, match="size"):
        sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    larger = sinkbench.AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **changes)
    assert larger.lm_head.weight.shape[0] == tiny.VOCABULARY + 8


def test_architecture_classes_are_where_people_expect_them():
    for name in ("Llama", "Falcon", "Mistral", "GPTNeoX", "Mpt", "GPTJ", "Qwen2", "Qwen3", "StableLm", "Phi", "Gemma"):
        assert getattr(sinkbench, f"{name}ForCausalLM").of is getattr(transformers, f"{name}ForCausalLM")
        assert getattr(sinkbench, f"{name}Model").of is getattr(transformers, f"{name}Model")
    config = tiny.shared("llama").config
    assert isinstance(sinkbench.LlamaForCausalLM(config, **SIZES), transformers.LlamaForCausalLM)
    assert set(vars(sinkbench.AutoModelForCausalLM.from_config(config))) >= set(METHODS)
    for name in ("NoSuchForCausalLM", "BertTokenizer", "nonsense"):
        with pytest.raises(AttributeError, match=name):
            getattr(sinkbench, name)


def test_importing_sinkbench_does_not_import_torch():
    code = "import sys, sinkbench, sinkbench.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
