"""Families: how the positions of each architecture work, read off once and used by both engines.

Rotary models need no entry: :func:`read_positions` feeds one token at two positions and finds, layer by layer,
which of the model's frequencies and which pairing of features turn the one key into the other. Models with ALiBi,
or with a table of positions that ends, have one entry each in :data:`FAMILIES`. What cannot be explained is an
error and never a wrong number.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sinkbench.errors import UserError
from sinkbench.positions.bare import bare, device_of, first_parameter
from sinkbench.positions.families import family_of, takes_positions, text_config
from sinkbench.positions.rotary import Rope, wide

STREAMABLE = "rotary (Llama, Mistral, Qwen, Falcon, GPT-NeoX, GPT-J, ...) or ALiBi (MPT, BLOOM)"


class LearnedPositions(UserError):
    """The model adds positions to its hidden states."""


_READ: WeakKeyDictionary[PreTrainedModel, tuple[tuple[Any, ...], list[Rope | None]]] = WeakKeyDictionary()
DECIDING = ("rope_parameters", "rotary_dim", "max_position_embeddings", "num_hidden_layers", "layer_types")


def read_positions(model: PreTrainedModel) -> list[Rope | None]:
    """How the keys of each layer of ``model`` turn with position: a :class:`Rope`, or ``None`` where they do not.

    They are read once, and again where the model has moved, or its configuration says something else of positions.

    Raises:
        LearnedPositions: the model adds positions elsewhere.
        UserError: the model turns its keys in an unknown way.
    """
    facts = facts_of(model)
    known = _READ.get(model)
    if known is None or known[0] != facts:
        known = _READ[model] = copy.deepcopy(facts), _read(model)
    return known[1]


def facts_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """What decides how keys turn, beside the weights; to be compared, by whoever remembers what follows from it."""
    config = text_config(model)
    said, names = vars(config), config.attribute_map  # as a configuration's own way to an attribute is a long one
    first = first_parameter(model)
    dtype = first.dtype if first is not None and first.is_floating_point() else model.dtype
    return dtype, device_of(model), *[said.get(names.get(name, name)) for name in DECIDING]


def _read(model: PreTrainedModel) -> list[Rope | None]:
    """As :func:`read_positions`, anew.

    One token is fed at position 0 and at a later one. It attends to itself alone, so in a model whose
    positions live in attention only, the values of all layers agree and the keys differ by a turn.
    """
    if family_of(model).alibi:
        return [None] * model.config.get_text_config(decoder=True).num_hidden_layers
    if not takes_positions(model):
        raise LearnedPositions(_not_streamable(model))
    candidates = _frequencies(model)
    step = min([7] + [rope.limit - 2 for _, rope in candidates if rope.limit])
    kinds = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))[0]
    alike: dict[tuple[object, ...], list[int]] = {}
    layers = _keys_and_values(model, step)
    for index, layer in layers.items():
        alike.setdefault((kinds[index], *((part.shape, part.device) for part in layer)), []).append(index)
    found: list[Rope | None] = [None] * len(kinds)
    for (kind, *_), indices in alike.items():
        ropes = [rope for wanted, rope in candidates if wanted in (None, kind)]
        keys, values = (torch.stack([layers[i][part] for i in indices], dim=1).to(wide(model.dtype)) for part in (0, 1))
        for index, difference in zip(indices, _read_off(keys, values, step, ropes), strict=True):
            found[index] = _match(model, difference, ropes)
    return found


def check_reach(model: PreTrainedModel, length: int) -> None:
    """Raise where dense attention over ``length`` tokens would run past a table of learned positions."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is None or length <= context:
        return
    try:
        read_positions(model)
    except LearnedPositions as error:
        raise UserError(f"{error}, or stay below --num-tokens {context}") from error
    except UserError:
        return  # dense attention never moves a key


def _keys_and_values(model: PreTrainedModel, step: int) -> dict[int, tuple[Tensor, Tensor]]:
    """What each layer that keeps any has of one token at positions 0 and ``step``, each ``(2, heads, 1, dim)``."""
    cache = _Unscored(config=model.config)
    embeddings = model.get_input_embeddings().weight[:1024]
    device = device_of(model)
    offloaded, some = embeddings.is_meta, torch.tensor(len(embeddings) // 2)
    loudest = some if offloaded else embeddings.float().norm(dim=-1).argmax()  # no zeros, as padding embeds
    token = loudest.to(device).expand(2, 1)
    positions = torch.tensor([[0], [step]], device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        bare(model)(token, position_ids=positions, past_key_values=cache, use_cache=True)
    read = {i: (getattr(layer, "keys", None), getattr(layer, "values", None)) for i, layer in enumerate(cache.layers)}
    return {i: (keys, values) for i, (keys, values) in read.items() if keys is not None and values is not None}


class _Unscored(DynamicCache):
    """Keeps keys, and answers with zeros in their place.

    A token that attends to itself alone does so whatever its score, but where a learned sink shares the softmax. There
    the rounding of a turned key would reach the hidden states, and might send the token to other experts from there on.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return torch.zeros_like(keys), values


@dataclass(frozen=True)
class Difference:
    """How far a layer's keys and values at two positions lie apart, relative to their norms.

    Attributes:
        values: of one another; so are ``keys``.
        turned: the key of the one position, moved to the other by each candidate, from the key there.
        silent: whether the keys are all zeros.
    """

    values: float
    keys: float
    turned: list[float]
    silent: bool


def _read_off(keys: Tensor, values: Tensor, step: int, candidates: list[Rope]) -> list[Difference]:
    """For layers that are alike: of keys and values ``(2, layers, heads, 1, dim)`` at positions 0 and ``step``.

    All layers are compared at once and read from the device once: a stream's start should not cost hundreds of waits.
    """
    by = torch.tensor([step], device=keys.device)
    pairs = [(values[0], values[1]), (keys[0], keys[1]), *((rope.move(keys[0], by), keys[1]) for rope in candidates)]
    loud = keys.abs().amax(dim=(0, 2, 3, 4))
    rows = torch.stack([*(_distance(a, b) for a, b in pairs), loud]).T.tolist()
    return [Difference(row[0], row[1], row[2:-1], row[-1] == 0) for row in rows]


def _match(model: PreTrainedModel, difference: Difference, candidates: list[Rope]) -> Rope | None:
    tolerance = 1e-3 if model.dtype.itemsize >= 4 else 3e-2
    if difference.values > tolerance:
        raise LearnedPositions(_not_streamable(model))
    if difference.silent:
        raise UserError(f"the keys of {type(model).__name__} are all zeros: their positions cannot be read")
    if difference.keys <= tolerance * 1e-2:
        return None
    error, best = min(((error, i) for i, error in enumerate(difference.turned)), default=(math.inf, -1))
    if error > tolerance:
        raise UserError(
            f"the keys of {type(model).__name__} do not turn as sinkbench expects of this family (relative "
            f"error {error:.2g}): run it with --experiment transformers, or add it to sinkbench/positions/families.py"
        )
    return candidates[best]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Of ``(layers, heads, 1, dim)``: the relative distance in each layer, shape ``(layers,)``."""
    return (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-12)


def _not_streamable(model: PreTrainedModel) -> str:
    return (
        f"{type(model).__name__} learns absolute positions, or adds them outside of attention: it cannot stream past "
        f"its context. Choose a model whose positions are {STREAMABLE}"
    )


def _frequencies(model: PreTrainedModel) -> list[tuple[str | None, Rope]]:
    """Every set of rotary frequencies that ``model`` holds, in both pairings, and the kind of layers it is for."""
    found: list[tuple[str | None, Rope]] = []
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name.endswith("inv_freq") and "original" not in name and "long" not in name:
                kind = name.removesuffix("inv_freq").rstrip("_") or None
                rope = _rope(module, kind, buffer)
            elif name == "embed_positions":
                kind, rope = None, Rope(_sinusoid_frequencies(buffer))
            else:
                continue
            if not any(kind == known and torch.equal(rope.inv_freq, other.inv_freq) for known, other in found):
                found.append((kind, rope))
    return found + [(kind, replace(rope, pairing="interleaved")) for kind, rope in found]


def _sinusoid_frequencies(table: Tensor) -> Tensor:
    """The frequencies behind a table ``(positions, dim)`` of sines and cosines of GPT-J."""
    dim = table.shape[1]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64) / dim
    return (1.0 / (10000**exponents)).double().to(table.device)


def _rope(module: nn.Module, layer_type: str | None, inv_freq: Tensor) -> Rope:
    kind = getattr(module, "rope_type", "default")
    kind = kind.get(layer_type, "default") if isinstance(kind, dict) else kind
    if kind != "longrope" and "dynamic" not in kind:
        return Rope(inv_freq.double())
    config = module.config
    parameters = config.rope_parameters[layer_type] if layer_type else config.rope_parameters
    limit = config.max_position_embeddings
    if kind == "longrope":
        limit = parameters["original_max_position_embeddings"]
    make = ROPE_INIT_FUNCTIONS[kind]
    named = {"layer_type": layer_type} if layer_type else {}

    def rescale(length: int) -> Tensor:
        # the model's own arithmetic: dynamic NTK counts positions in a tensor, and float32 rounds what follows
        seen = torch.tensor(length, device=inv_freq.device) if "dynamic" in kind else length
        return make(config, inv_freq.device, seq_len=seen, **named)[0]

    original = getattr(module, f"{layer_type}_original_inv_freq" if layer_type else "original_inv_freq")
    return Rope(original.to(inv_freq.device).double(), limit=limit, rescale=rescale)
