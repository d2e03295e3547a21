"""Attention for many tokens at once under a strategy: a band of recent keys, and the sinks, in one softmax.

Token ``t`` of a stream with window ``W = S + R`` attends to the window keys ``max(S, t - R) .. t`` at their distance
in the text, and to the sinks ``0 .. S - 1`` as if it stood at position ``min(t, W)``: its query is turned by
``min(t, W) - t`` for them. Each part gives an output and the logarithm of its softmax's denominator; the two
are folded into the softmax over both (see docs/parallel.md).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sinkbench.attention.adapters import adapted

Attend = Callable[..., Tensor]


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
