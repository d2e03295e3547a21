"""Families: how the positions of each architecture work, read off once and used by both engines.

Rotary models need no entry: :func:`read_positions` feeds one token at two positions and finds, layer by layer,
which of the model's frequencies and which pairing of features turn the one key into the other. Models with ALiBi,
or with a table of positions that ends, have one entry each in :data:`FAMILIES`. What cannot be explained is an
error and never a wrong number.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as bloom_alibi
from transformers.models.codegen.modeling_codegen import create_sinusoidal_positions
from transformers.models.falcon.modeling_falcon import build_alibi_tensor as falcon_alibi
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from sinkbench.calls import LOCK, NOTHING
from sinkbench.positions.alibi import Alibi
from sinkbench.positions.bare import device_of

Undo = Callable[[], None]

_SIGNATURES: WeakKeyDictionary[Callable[..., Any], inspect.Signature] = WeakKeyDictionary()  # of bound methods
_TEXT: WeakKeyDictionary[PreTrainedModel, tuple[PreTrainedConfig, PreTrainedConfig]] = WeakKeyDictionary()
_TABLES: WeakKeyDictionary[PreTrainedModel, list[Any]] = WeakKeyDictionary()  # the modules that look angles up
_LENGTHENED: WeakKeyDictionary[PreTrainedModel, list[Undo]] = WeakKeyDictionary()  # one for each call under way


@dataclass(frozen=True)
class Family:
    """What is special about the positions of one architecture.

    Attributes:
        alibi: builds the ALiBi terms of a model; ``None`` where keys rotate instead.
        lengthen: for models with a table of positions that ends at the training length: makes it last for
            ``length`` positions and returns how to undo that.
    """

    alibi: Callable[[PreTrainedModel], Alibi] | None = None
    lengthen: Callable[[PreTrainedModel, int], Undo] | None = None


def _bloom_terms(model: PreTrainedModel) -> Alibi:
    heads, dtype, device = model.config.num_attention_heads, model.dtype, device_of(model)
    return Alibi(lambda n: bloom_alibi(torch.ones(1, n, device=device), heads, dtype)[:, 0].float())


def _falcon_terms(model: PreTrainedModel) -> Alibi:
    heads, dtype, device = model.config.num_attention_heads, model.dtype, device_of(model)
    scale = 1 / math.sqrt(model.config.hidden_size // heads)  # Falcon scales the sum of score and term
    ones = lambda n: torch.ones(1, n, device=device, dtype=torch.long)  # noqa: E731
    return Alibi(lambda n: falcon_alibi(ones(n), heads, dtype)[:, 0].float() * scale)


def _mpt_terms(model: PreTrainedModel) -> Alibi:
    heads, device = model.config.num_attention_heads, device_of(model)
    return Alibi(lambda n: build_mpt_alibi_tensor(heads, n, device=device)[:, 0].float())


def _lengthen_mpt(model: PreTrainedModel, length: int) -> Undo:
    """MPT cuts its ALiBi terms from a strip of ``max_seq_len``; a longer strip has the same end."""
    config, before = model.config, model.config.max_seq_len
    if length > before:
        config.max_seq_len = length  # which takes a configuration as long as a layer, as does the way back

    def restore() -> None:
        if config.max_seq_len != before:
            config.max_seq_len = before

    return restore


def _lengthen_sinusoids(model: PreTrainedModel, length: int) -> Undo:
    """GPT-J and CodeGen look angles up in a table of ``max_position_embeddings`` rows; more rows, same formula."""
    modules = _TABLES.get(model)
    if modules is None:
        modules = _TABLES[model] = [m for m in model.modules() if hasattr(m, "embed_positions")]
    before = [m.embed_positions for m in modules]
    if before[0].shape[0] < length:
        table = create_sinusoidal_positions(length, before[0].shape[1]).to(before[0])
        for module in modules:
            module.embed_positions = table

    def restore() -> None:
        for module, old in zip(modules, before, strict=True):
            if module.embed_positions is not old:
                module.embed_positions = old

    return restore


ROTARY = Family()


SINUSOIDS = Family(lengthen=_lengthen_sinusoids)


FALCON_ALIBI = Family(alibi=_falcon_terms)


FAMILIES: dict[str, Family] = {
    "bloom": Family(alibi=_bloom_terms),
    "codegen": SINUSOIDS,
    "gptj": SINUSOIDS,
    "mpt": Family(alibi=_mpt_terms, lengthen=_lengthen_mpt),
}


def family_of(model: PreTrainedModel) -> Family:
    """The entry for ``model``."""
    config = text_config(model)
    if config.model_type == "falcon" and config.alibi:
        return FALCON_ALIBI
    return FAMILIES.get(config.model_type, ROTARY)


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The part of the configuration of ``model`` that is about its text, which it would take long to find anew."""
    known = _TEXT.get(model)
    if known is None or known[0] is not model.config:
        known = _TEXT[model] = model.config, model.config.get_text_config(decoder=True)
    return known[1]


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the forward of ``model`` can be told the positions of its tokens."""
    return "position_ids" in signature_of(model.forward).parameters


def signature_of(method: Callable[..., Any]) -> inspect.Signature:
    """As ``inspect.signature``, which takes longer than a layer does: once for each function."""
    while not hasattr(method, "__func__") and hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    function = getattr(method, "__func__", None)
    if function is None:
        return inspect.signature(method)
    if function not in _SIGNATURES:
        _SIGNATURES[function] = inspect.signature(method)
    return _SIGNATURES[function]


def lasting(model: PreTrainedModel, length: int) -> AbstractContextManager[None]:
    """Within this context, position tables of ``model`` last for ``length`` positions, or more.

    A longer table is the same for whoever calls the model meanwhile; the last to leave restores it.
    """
    lengthen = family_of(model).lengthen
    return NOTHING if lengthen is None else _lasting(model, length, lengthen)


@contextmanager
def _lasting(model: PreTrainedModel, length: int, lengthen: Callable[[PreTrainedModel, int], Undo]) -> Iterator[None]:
    with LOCK:
        undo = _LENGTHENED.setdefault(model, [])
        undo.append(lengthen(model, length))
    try:
        yield
    finally:
        with LOCK:
            if len(undo) > 1:
                undo.pop()  # what the first has changed is what it was
            else:
                del _LENGTHENED[model]
                undo[0]()


def experts_in(config: Any) -> int:
    """How many experts a layer of such a model chooses from; 0 where there is nothing to choose."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return next((count for name in names if (count := getattr(config, name, None))), 0)
