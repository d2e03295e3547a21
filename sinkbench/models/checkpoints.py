"""What a checkpoint may hold: no code, all the weights of its configuration and no others, finite numbers."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sinkbench.errors import UserError
from sinkbench.signals import check
from sinkbench.validation import LONGEST, shown

SAFE, PICKLED = re.compile(r"[^/]+\.safetensors"), re.compile(r"pytorch_model[^/]*\.bin")
# Buffers that older code saved and newer code computes, and heads that no prediction of the next token goes through.
HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|(attn|attention)\.(masked_)?bias$|position_ids$|^v_head\.|^(model\.)?mtp\."
)


def refuse_pickles(name: str, files: Iterable[str]) -> None:
    """Refuse a repository or folder whose only weights are pickled: a pickle can hold any program.

    Raises:
        UserError: there are pickled weights, and no safetensors.
    """
    files = list(files)
    if not any(map(SAFE.fullmatch, files)) and any(map(PICKLED.fullmatch, files)):
        raise UserError(
            f"{name!r} has only pickled weights (pytorch_model.bin), which may hold code: "
            "give --allow-pickle to read the tensors in them, or use a model in safetensors"
        )


def refuse_adapters(name: str, files: Iterable[str]) -> None:
    """Refuse a repository or folder with an adapter: what reads one depends on which packages are installed.

    Raises:
        UserError: there is one.
    """
    if "adapter_config.json" in files:
        raise UserError(
            f"{name!r} holds an adapter (adapter_config.json), which only an installed peft would read: merge it into "
            "the model (merge_and_unload, save_pretrained) and give that folder"
        )


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")


def check_config(name: str, config: PretrainedConfig) -> None:
    """Refuse a configuration by which no model predicts, or only NaN.

    Raises:
        UserError: a size is no number of at least 1, a window is missing or empty, or a base of rotary frequencies is
            not above 0.
    """
    config = config.get_text_config(decoder=True)
    for size in SIZES:
        value = getattr(config, size, None)
        if value is not None and not (type(value) is int and 0 < value <= LONGEST):
            raise UserError(f"the config.json of {name!r} has {size} {shown(value)}: it must be at least 1")
    kinds = getattr(config, "layer_types", None) or []
    for kind, key in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        window = getattr(config, key, None)
        if (kind in kinds and window is None) or not (window is None or (type(window) is int and window > 0)):
            raise UserError(f"the config.json of {name!r} has {key} {shown(window)}: its layers need one of at least 1")
    for theta in _thetas(getattr(config, "rope_parameters", None)):
        if type(theta) not in (int, float) or not 0 < theta < math.inf:
            raise UserError(f"the config.json of {name!r} has rope_theta {shown(theta)}: it must be above 0")


def _thetas(parameters: Any) -> Iterator[Any]:
    """Every base of rotary frequencies in a configuration, one for all layers or one a kind of them."""
    for key, value in parameters.items() if isinstance(parameters, dict) else ():
        if key == "rope_theta":
            yield value
        else:
            yield from _thetas(value)


def check_complete(name: str, info: dict[str, Any], quantized: bool = False) -> None:
    """Refuse a model that is not what its files say: weights that would be random, or files that would go unread.

    ``info`` is what ``from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)`` tells. Tied
    weights are not missing. Quantised checkpoints have tensors of their own beside the weights: theirs do not count.

    Raises:
        UserError: a weight is missing, has another shape than the configuration says, or has no place in the model.
    """
    advice = "config.json and the weights do not belong together, or a file is missing: get the model again"
    if info["mismatched_keys"]:
        key, there, wanted = min(info["mismatched_keys"])
        raise UserError(f"{name!r} holds {key} as {list(there)}, its config.json says {list(wanted)}: {advice}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{name!r} lacks {_some(missing)}, which would be random: {advice}")
    foreign = sorted(key for key in info["unexpected_keys"] if not HARMLESS.search(key))
    if foreign and not quantized:
        raise UserError(f"{name!r} holds {_some(foreign)}, which its config.json has no place for: {advice}")


def _some(keys: list[str]) -> str:
    return f"{keys[0]} and {len(keys) - 1} other weights" if len(keys) > 1 else keys[0]


def check_finite(name: str, model: PreTrainedModel) -> None:
    """Refuse NaN and infinite weights: every number measured with them would be NaN.

    Raises:
        UserError: a weight is not finite.
    """
    for key, weight in model.named_parameters():
        check()
        readable = weight.is_floating_point() and weight.element_size() > 1 and weight.device.type != "meta"
        if readable and not torch.isfinite(weight).all():
            raise UserError(f"{name!r} holds NaN or infinity in {key}: the file is damaged, get the model again")
