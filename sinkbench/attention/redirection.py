"""A model's attention in our hands, for as long as a ``with`` lasts.

:func:`attending` is for models that threads share. One attention is registered with transformers, once and for good.
The model's configuration names it to those calls alone that have a cache of ours, where it finds that cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench.attention import by_position, by_score, by_version
from sinkbench.attention.adapters import adapted, methods_of
from sinkbench.attention.naming import naming
from sinkbench.attention.scores import Scores
from sinkbench.cache.kivi import KiviLayer
from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import StripLayer
from sinkbench.calls import NOTHING, here, standing_in
from sinkbench.compilers import launching_on
from sinkbench.positions.families import family_of

Attend = Callable[..., Tensor]
NAME = "sinkbench"


@dataclass(frozen=True)
class Attention:
    """What the attentions of a model are in one call.

    Attributes:
        attend: as of :func:`redirected`.
        capped: whether soft caps are applied: not where the model's own implementation leaves them out, as sdpa does.
    """

    attend: Attend
    capped: bool


@contextmanager
def attending(model: PreTrainedModel, cache: StreamCache) -> Iterator[None]:
    """Within this context, forwards of ``model`` with ``cache`` read what its plan says.

    They may feed many tokens at once, except where entries that go by a score stand at their rank. It holds in this
    thread or task alone: other forwards of the model are its own.

    Raises:
        UserError: the attention of ``model`` cannot be redirected.
    """
    attend = _attend_for(model, cache)
    adapters = {place: _without_own(method) for place, method in methods_of(model, attend).items()}
    configs = _configs(model)
    attention = Attention(attend, all(config._attn_implementation != "sdpa" for config in configs))
    _takes_over(cache, True)
    try:
        with naming(configs, NAME, attention), standing_in(adapters):
            yield
    finally:
        _takes_over(cache, False)


def _without_own(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda own, *args, **kwargs: method(*args, **kwargs)


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Those that the modules of ``model`` look into, each once."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


def _takes_over(cache: StreamCache, ours: bool) -> None:
    for layer in cache.kept:
        if isinstance(layer, StripLayer):
            layer.sinks_in_attention = ours
        else:
            layer.reads_chunks = ours


def _attend_for(model: PreTrainedModel, cache: StreamCache) -> Attend:
    make = family_of(model).alibi
    alibi = make(model) if make else None
    shared = by_position.Shared()

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: Any) -> Tensor:
        """Answers with ``(B, H, n, D)`` for queries ``(B, H, n, D)`` of layer ``index``, just after its update."""
        layer, scores, wanted = cache.layers[index], Scores(scale, alibi=alibi, **special), query.dtype
        kept, kind = layer.values.dtype, query.device.type
        if not query.dtype == key.dtype == value.dtype == kept:
            query, key, value = query.to(kept), key.to(kept), value.to(kept)  # alike, but under autocast
        with (
            launching_on(query.device),  # one of those over which a model is spread
            torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else NOTHING,
        ):
            return of_layer(layer, query, key, value, scores).to(wanted)

    def of_layer(layer: CacheLayerMixin, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        if isinstance(layer, ScoredLayer):
            return by_score.attend(layer, query, key, value, scores)
        if isinstance(layer, KiviLayer):
            return by_version.attend(layer, query, scores)
        assert isinstance(layer, StripLayer)
        return by_position.attend(layer, query, key, value, scores, shared)

    return attend


@contextmanager
def redirected(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within this context, every attention of ``model`` is ``attend(layer, query, key, value, scale, ...)``.

    Whoever calls it: the model must be the caller's alone, as a compiler that reads it knows nothing of threads.

    Raises:
        UserError: the attention of ``model`` can neither be replaced through transformers' registry nor is there an
            adapter for it.
    """
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    name = f"{NAME}_{id(attend)}"
    try:
        ALL_ATTENTION_FUNCTIONS.register(name, _registered(Attention(attend, capped="sdpa" not in before)))
        for config in configs:
            # a name without a mask function: transformers then builds no mask, the band is ours
            config._attn_implementation = name
        with adapted(model, attend):
            yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def _registered(attention: Attention | None) -> Callable[..., tuple[Tensor, None]]:
    """``attention``, or that of the call, with the signature of transformers' attention registry."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        ours = here(id(module.config)) if attention is None else attention
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        cap = softcap if ours.capped else None
        out = ours.attend(module.layer_idx, query, key, value, scale, softcap=cap, extra=s_aux)
        return out.transpose(1, 2).contiguous(), None

    return forward


ALL_ATTENTION_FUNCTIONS.register(NAME, _registered(None))
