"""Adapters for the models that do not take their attention from transformers' registry.

Each says how one attention module makes its queries, keys and values and what it does with the result; the
attention itself is handed in (:mod:`sinkbench.attention.bands`). They hold within a ``with`` and leave nothing behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers import PreTrainedModel
from transformers.models.bloom.modeling_bloom import BloomAttention
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.falcon import modeling_falcon
from transformers.models.falcon.modeling_falcon import FalconAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention
from transformers.models.mpt.modeling_mpt import MptAttention

from sinkbench.errors import UserError
from sinkbench.positions.bare import device_of

Attend = Callable[..., Tensor]


def _heads_last(out: Tensor) -> Tensor:
    """``(B, H, n, D)`` to ``(B, n, H * D)``."""
    return out.transpose(1, 2).flatten(2)


def _gptj(module: Any, attend: Attend) -> dict[str, Callable]:
    def attn(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return attend(module.layer_idx, query.to(value.dtype), key, value, 1 / float(module.scale_attn)), None

    return {"_attn": attn}


def _falcon_heads(module: Any, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``(B, n, H, D)``, keys and values ``(B, n, Hkv, D)``.

    Without the indices of Falcon's own that no graph can capture, and without its copies of a group's keys.
    """
    if not module.new_decoder_architecture and not module.multi_query:
        return module._split_heads(fused)
    if not module.new_decoder_architecture:
        heads = fused.unflatten(-1, (module.num_heads + 2, module.head_dim))
        return heads[..., :-2, :], heads[..., -2:-1, :], heads[..., -1:, :]
    groups = fused.unflatten(-1, (-1, module.num_heads // module.num_kv_heads + 2, module.head_dim))
    return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]


def _falcon(module: Any, attend: Attend) -> dict[str, Callable]:
    def forward(
        hidden_states: Tensor, alibi: Tensor | None, layer_past: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in _falcon_heads(module, module.query_key_value(hidden_states)))
        if alibi is None:
            query, key = modeling_falcon.apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        key, value = layer_past.update(key, value, module.layer_idx)
        return module.dense(_heads_last(attend(module.layer_idx, query, key, value, module.inv_norm_factor))), None

    return {"forward": forward}


def _bloom(module: Any, attend: Attend) -> dict[str, Callable]:
    def forward(hidden_states: Tensor, residual: Tensor, layer_past: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        query, key, value = module._reshape(module.query_key_value(hidden_states))
        key, value = layer_past.update(key, value, module.layer_idx)
        out = module.dense(_heads_last(attend(module.layer_idx, query, key, value, module.inv_norm_factor)))
        return residual + dropout(out, module.hidden_dropout, module.training), None

    return {"forward": forward}


def _mpt(module: Any, attend: Attend) -> dict[str, Callable]:
    def forward(hidden_states: Tensor, past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = (x.unflatten(-1, (module.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
        key, value = past_key_values.update(key, value, module.layer_idx)
        return module.out_proj(_heads_last(attend(module.layer_idx, query, key, value, module.softmax_scale))), None

    return {"forward": forward}


ADAPTERS: dict[type[nn.Module], Callable[[Any, Attend], dict[str, Callable]]] = {
    BloomAttention: _bloom,
    CodeGenAttention: _gptj,
    FalconAttention: _falcon,
    GPTJAttention: _gptj,
    MptAttention: _mpt,
}


def replaceable(model: PreTrainedModel) -> bool:
    """Whether the attention of ``model`` can be replaced: through transformers' registry, or by an adapter."""
    return model._can_set_attn_implementation() or any(isinstance(m, tuple(ADAPTERS)) for m in model.modules())


def methods_of(model: PreTrainedModel, attend: Attend) -> dict[tuple[nn.Module, str], Callable]:
    """The methods of attention modules named in :data:`ADAPTERS`, by module and name, as they call ``attend``.

    Raises:
        UserError: the model neither has such modules nor supports transformers' attention registry.
    """
    if not replaceable(model):
        raise UserError(
            f"the attention of {type(model).__name__} cannot be fed many tokens at once under a strategy: "
            "use --engine stepwise"
        )
    found = [(m, make) for m in model.modules() for kind, make in ADAPTERS.items() if isinstance(m, kind)]
    return {(m, _place(m, name)): method for m, make in found for name, method in make(m, attend).items()}


def _place(module: nn.Module, name: str) -> str:
    """Where the method ``name`` is to be replaced: behind what Accelerate has stood before it."""
    return "_old_forward" if name == "forward" and "_old_forward" in vars(module) else name


@contextmanager
def adapted(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Within this context, attention modules named in :data:`ADAPTERS` call ``attend``, whoever calls them.

    Raises:
        UserError: as :func:`methods_of`.
    """
    methods = methods_of(model, attend)
    before = {(module, name): vars(module).get(name) for module, name in methods}
    try:
        for (module, name), method in methods.items():
            object.__setattr__(module, name, method)
        yield
    finally:
        for (module, name), own in before.items():
            if own is not None:
                object.__setattr__(module, name, own)
            elif name in vars(module):
                object.__delattr__(module, name)


def mask_argument(model: PreTrainedModel) -> dict[str, Tensor]:
    """A stand-in for the mask, for MPT, which cannot do without one; it is never looked at."""
    if any(isinstance(m, MptAttention) for m in model.modules()):
        return {"attention_mask": torch.zeros(1, 1, 1, 1, device=device_of(model))}
    return {}
