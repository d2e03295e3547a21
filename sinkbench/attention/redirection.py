"""A model's attention in our hands, for as long as a ``with`` lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench.attention import by_position, by_score, by_version
from sinkbench.attention.adapters import adapted
from sinkbench.attention.scores import Scores
from sinkbench.cache.kivi import KiviLayer
from sinkbench.cache.scored import ScoredLayer
from sinkbench.cache.stream import StreamCache
from sinkbench.cache.strip import StripLayer
from sinkbench.positions.families import family_of

Attend = Callable[..., Tensor]


@contextmanager
def attending(model: PreTrainedModel, cache: StreamCache) -> Iterator[None]:
    """Within this context, forwards of ``model`` with ``cache`` read what its plan says.

    They may feed many tokens at once, except where entries that go by a score stand at their rank.

    Raises:
        UserError: the attention of ``model`` cannot be redirected.
    """
    _takes_over(cache, True)
    try:
        with redirected(model, _attend_for(model, cache)):
            yield
    finally:
        _takes_over(cache, False)


def _takes_over(cache: StreamCache, ours: bool) -> None:
    for layer in cache.kept:
        if isinstance(layer, StripLayer):
            layer.sinks_in_attention = ours
        else:
            layer.reads_chunks = ours


def _attend_for(model: PreTrainedModel, cache: StreamCache) -> Attend:
    make = family_of(model).alibi
    alibi = make(model) if make else None
    rotations: by_position.Rotations = {}

    def attend(index: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **special: Any) -> Tensor:
        """Answers with ``(B, H, n, D)`` for queries ``(B, H, n, D)`` of layer ``index``, just after its update."""
        layer, scores = cache.layers[index], Scores(scale, alibi=alibi, **special)
        if isinstance(layer, ScoredLayer):
            return by_score.attend(layer, query, key, value, scores)
        if isinstance(layer, KiviLayer):
            return by_version.attend(layer, query, scores)
        assert isinstance(layer, StripLayer)
        return by_position.attend(layer, query, key, value, scores, rotations)

    return attend


@contextmanager
def redirected(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within this context, every attention of ``model`` is ``attend(layer, query, key, value, scale, ...)``.

    Raises:
        UserError: the attention of ``model`` can neither be replaced through transformers' registry nor is there an
            adapter for it.
    """
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    name = f"sinkbench_{id(attend)}"
    try:
        ALL_ATTENTION_FUNCTIONS.register(name, _registered(attend, capped="sdpa" not in before.values()))
        for config in configs.values():
            # a name without a mask function: transformers then builds no mask, the band is ours
            config._attn_implementation = name
        with adapted(model, attend):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(name, None)


def _registered(attend: Attend, capped: bool) -> Callable[..., tuple[Tensor, None]]:
    """``attend`` with the signature of transformers' attention registry.

    Soft caps are left out where the model's own implementation leaves them out, as sdpa does.
    """

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
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = attend(module.layer_idx, query, key, value, scale, softcap=softcap if capped else None, extra=s_aux)
        return out.transpose(1, 2).contiguous(), None

    return forward
