"""Tiny random models in float32, one builder for each way in which positions or layers differ."""

from functools import cache, partial
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sinkbench.models.sizes import layer_sizes
from sinkbench.strategies import Plan, choose

VOCABULARY = 256


class Builder(Protocol):
    """Builds a model; keyword arguments replace configuration values."""

    def __call__(self, **changes: Any) -> PreTrainedModel: ...


def build(model_type: str, attn: str | None = None, **values: Any) -> PreTrainedModel:
    """A seeded random causal language model in eval mode; weights are wide enough for attention to be selective."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # as in many models, padding embeds as zeros
    common = {"vocab_size": VOCABULARY, "initializer_range": 0.25, **ids, **sizes}
    config = AutoConfig.for_model(model_type, **{**common, **values})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attn)
    return model.eval()


def plan(
    model: PreTrainedModel,
    strategy: str,
    window: int = 16,
    sinks: int | None = 4,
    positions: str | None = None,
    kv_format: str = "model",
    **values: Any,
) -> Plan:
    """What ``strategy`` with these parameters keeps of ``model``, in this format."""
    return choose(strategy, window, sinks, values, positions, kv_format).plan(layer_sizes(model.config))


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    """A stream of ``n`` random token ids."""
    return torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def _scaled(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


GROUPED = {"num_key_value_heads": 2}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "head_dim": 16, **GROUPED}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

ROTARY: dict[str, Builder] = {
    "llama": partial(build, "llama", **GROUPED),
    "mistral": partial(build, "mistral", **GROUPED),
    "qwen2": partial(build, "qwen2", **GROUPED),
    "qwen3": partial(build, "qwen3", head_dim=16, **GROUPED),
    "falcon": partial(build, "falcon", multi_query=True),
    "falcon-grouped": partial(build, "falcon", new_decoder_architecture=True, num_kv_heads=2),
    "gpt_neox": partial(build, "gpt_neox"),
    "stablelm": partial(build, "stablelm", num_key_value_heads=4),
    "phi": partial(build, "phi"),
    "phi3": partial(build, "phi3", **GROUPED),
    "gemma": partial(build, "gemma", head_dim=16, num_key_value_heads=1),
    "olmo": partial(build, "olmo"),
    "olmo2": partial(build, "olmo2"),
    "gptj": partial(build, "gptj", rotary_dim=8),
    "gptj-whole-head": partial(build, "gptj", rotary_dim=16),
    "codegen": partial(build, "codegen", rotary_dim=8),
    "cohere": partial(build, "cohere", logit_scale=1.0, **GROUPED),
    "glm": partial(build, "glm", head_dim=16, **GROUPED),
    "glm4": partial(build, "glm4", head_dim=16, **GROUPED),
    "granite": partial(build, "granite", **GROUPED),
}

SCALED: dict[str, Builder] = {
    "linear": partial(build, "llama", **_scaled("linear", factor=4.0)),
    "dynamic": partial(build, "llama", **_scaled("dynamic", factor=4.0), max_position_embeddings=64),
    "llama3": partial(build, "llama", **_scaled("llama3", **LLAMA3), max_position_embeddings=512),
    "yarn": partial(build, "llama", **_scaled("yarn", **YARN), max_position_embeddings=256),
    "longrope": partial(build, "phi3", **_scaled("longrope", **LONG), max_position_embeddings=512),
}

ALIBI: dict[str, Builder] = {
    "bloom": partial(build, "bloom"),
    "mpt": partial(build, "mpt"),
    "falcon-alibi": partial(build, "falcon", attn="sdpa", alibi=True),
}

HYBRID: dict[str, Builder] = {
    "gemma2": partial(build, "gemma2", attn="eager", **MIXED),
    "gemma3": partial(build, "gemma3_text", **MIXED),
    "cohere2": partial(build, "cohere2", logit_scale=1.0, **MIXED),
    "smollm3": partial(build, "smollm3", no_rope_layers=[1, 0], **GROUPED),
    "gpt_oss": partial(build, "gpt_oss", num_local_experts=4, **MIXED, **EXPERTS),
    "qwen3_next": partial(
        build,
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        num_experts=4,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        **EXPERTS,
        **GROUPED,
    ),
}

STREAMABLE: dict[str, Builder] = {**ROTARY, **SCALED, **ALIBI, **HYBRID}


# One of each way of positions, layers and attention: with these, `make test` tries every combination.
FEW = ("llama", "gptj", "mpt", "falcon-alibi", "gemma3", "dynamic", "qwen3_next")


@cache
def shared(family: str) -> PreTrainedModel:
    """The model of a streamable family, one for all tests that leave it as it is."""
    return STREAMABLE[family]()


LEARNED: dict[str, Builder] = {
    "gpt2": partial(build, "gpt2"),
    "gpt_bigcode": partial(build, "gpt_bigcode"),
    "gpt_neo": partial(build, "gpt_neo", attention_types=[[["global", "local"], 1]]),
    "opt": partial(build, "opt", word_embed_proj_dim=64, ffn_dim=128),
    "xglm": partial(build, "xglm", d_model=64, num_layers=2, attention_heads=4, ffn_dim=128),
}
