"""A model that a program gives as an object: whether it can be measured, and what it is known by."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sinkbench.errors import UserError
from sinkbench.strategies.sources import source_digest

NAMES = ("_name_or_path", "_commit_hash", "transformers_version")  # of a configuration: where it is from, no numbers
LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes")  # whose classes are on record by their versions
ADVICE = "give a causal language model of transformers, such as AutoModelForCausalLM.from_pretrained returns"


def check_model(model: Any) -> None:
    """Refuse what is no causal language model of transformers with its own forward.

    Raises:
        UserError: one line that says what it is instead.
    """
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        unwrap = "; give what it wraps" if isinstance(model, nn.Module) else ""
        raise UserError(f"--model-name-or-path must be a name, or a model of transformers (got {kind}){unwrap}")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UserError(f"--model-name-or-path: {kind} does not predict the next token: {ADVICE}")
    if type(vars(model).get("forward")).__module__.startswith("sinkbench."):
        raise UserError(
            f"--model-name-or-path: this {kind} keeps sinks by itself, as sinkbench loaded it or a cache for it is in "
            "use: give the model as transformers loads it, and a strategy with experiment"
        )


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over configuration, weights, buffers and code: what decides the numbers of a model at hand.

    Where something of it cannot be known, as of hooks, the answer says so and is never the same again.
    """
    unknown = _unknown(model)
    if unknown:
        return f"unknown: {unknown} ({uuid4().hex})"
    about = {name: value for name, value in model.config.to_dict().items() if name not in NAMES}
    total = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for kind in sorted({type(module) for module in model.modules()}, key=repr):
        if not _of_library(kind):
            total.update(f"{kind.__qualname__} {source_digest(kind)}\n".encode())
    held = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    for name, value in sorted(held.items()):
        if isinstance(value, Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            total.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        else:
            total.update(f"{name} {value!r}\n".encode())
    return f"object sha256:{total.hexdigest()}"


def _unknown(model: PreTrainedModel) -> str:
    """What of ``model`` no hash can cover; empty where nothing is."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return "the model has adapters"
    if any(value.is_meta for value in (*model.parameters(), *model.buffers())):
        return "weights of the model are not in memory"
    for name, module in model.named_modules():
        own = vars(module)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or ("forward" in own and "_hf_hook" not in own):
            return f"{name or 'the model'} has hooks, or a forward of its own"
        kind = type(module)
        if not _of_library(kind) and source_digest(kind) is None:
            return f"the class {kind.__qualname__} lies in no file"
    return ""


def _of_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in LIBRARIES


def attention_for(config: PretrainedConfig) -> str | None:
    """The implementation that computes what the architecture says, where transformers' default may not."""
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"  # sdpa leaves Gemma 2's soft cap out
    if config.model_type == "falcon" and config.alibi:
        return "sdpa"  # eager adds the ALiBi terms twice in transformers 5.17
    return None


@contextmanager
def as_loaded(model: PreTrainedModel | None) -> Iterator[None]:
    """Within this context ``model`` computes as one that is loaded for a run: without dropout, with the attention that
    its architecture needs. Nothing else of it changes.
    """
    if model is None:
        yield
        return
    training = [module for module in model.modules() if module.training]
    own, needed = model.config._attn_implementation, attention_for(model.config.get_text_config(decoder=True))
    for module in training:
        module.training = False
    try:
        if needed not in (None, own):
            model.set_attn_implementation(needed)
        yield
    finally:
        if needed not in (None, own):
            model.set_attn_implementation(own)
        for module in training:
            module.training = True
