"""What a cut cache must answer, computed the slow way.

Keys are held as they are before any rotation. On every step the whole cache of every layer is rotated anew, by the
model's own functions, to the positions ``0, 1, 2, ...`` that its entries have inside the cache, with the frequencies
that the model uses for a sequence of that length. Nothing is ever rotated twice or back, and no position exceeds the
window.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

Rotate = Callable[[Tensor, Tensor], Tensor]  # unrotated keys (B, H, n, D) and their positions (n,)


class Rotations:
    """While :meth:`caught`, keys of ``model`` stay unrotated; :attr:`latest` says how the last ones would have been."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modeling = sys.modules[type(model).__module__]
        self.latest: Rotate | None = None
        self._tables: list[tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]] = []

    @contextmanager
    def caught(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self.model.modules():
                if type(module).__name__.endswith("RotaryEmbedding"):
                    stack.callback(module.register_forward_hook(self._note_table, with_kwargs=True).remove)
            if hasattr(self.modeling, "create_sinusoidal_positions"):
                stack.enter_context(patch.object(self.modeling, "apply_rotary_pos_emb", self._one_by_one()))
            elif hasattr(self.modeling, "apply_rotary_pos_emb"):
                stack.enter_context(patch.object(self.modeling, "apply_rotary_pos_emb", self._together()))
            yield

    def _note_table(self, module: Any, args: tuple, kwargs: dict, output: tuple[Tensor, Tensor]) -> None:
        def at(positions: Tensor) -> tuple[Tensor, Tensor]:
            if "position_ids" in kwargs:
                return module.forward(*args, **{**kwargs, "position_ids": positions[None]})
            return module.forward(args[0], positions[None], *args[2:], **kwargs)

        self._tables = [*self._tables[-3:], (output[0], at)]

    def _together(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """For models that rotate queries and keys in one call, by cosines from a rotary module."""
        original = self.modeling.apply_rotary_pos_emb

        def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            (at,) = [at for known, at in self._tables if known is cos]

            def rotate(keys: Tensor, positions: Tensor) -> Tensor:
                some = keys[..., : k.shape[-1]]
                return torch.cat((original(some, some, *at(positions), *rest)[1], keys[..., k.shape[-1] :]), dim=-1)

            self.latest = rotate
            return original(q, k, cos, sin, *rest)[0], k

        return apply

    def _one_by_one(self) -> Callable[..., Tensor]:
        """For GPT-J and CodeGen: one call for the keys, one for the queries, by sines from a table."""
        original, calls = self.modeling.apply_rotary_pos_emb, 0

        def apply(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls % 2 == 0:
                return original(x, sin, cos)
            size = x.shape[-1]

            def rotate(keys: Tensor, positions: Tensor) -> Tensor:
                table = self.modeling.create_sinusoidal_positions(int(positions.max()) + 1, size)[positions][None]
                some = original(keys[..., :size].transpose(1, 2), *table.chunk(2, dim=-1)).transpose(1, 2)
                return torch.cat((some, keys[..., size:]), dim=-1)

            self.latest = rotate
            return x

        return apply


class OracleLayer(CacheLayerMixin):
    """Unrotated keys, and values, of the first ``sinks`` and the last ``recent`` tokens."""

    supports_early_init = False

    def __init__(self, rotations: Rotations, sinks: int, recent: int, is_sliding: bool) -> None:
        super().__init__()
        self.rotations, self.sinks, self.recent, self.is_sliding = rotations, sinks, recent, is_sliding
        self.query = 0  # position of the token being fed

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values, self.is_initialized = key_states[:, :, :0], value_states[:, :, :0], True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)
        n = keys.shape[2]
        self.keys, self.values = self._cut(keys), self._cut(values)
        rotate, self.rotations.latest = self.rotations.latest, None
        if rotate is not None:
            keys = rotate(keys, torch.arange(self.query - n + 1, self.query + 1))
        return keys, values

    def _cut(self, x: Tensor) -> Tensor:
        if x.shape[2] <= self.sinks + self.recent:
            return x
        return torch.cat((x[:, :, : self.sinks], x[:, :, -self.recent :]), 2)

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def oracle(model: PreTrainedModel, stream: Tensor, window: int, sinks: int) -> Tensor:
    """The NLL of every token of ``stream`` but the first, from a cache of the first ``sinks`` and the latest tokens."""
    return _nll(oracle_logits(model, stream, window, sinks), stream)


def oracle_logits(model: PreTrainedModel, stream: Tensor, window: int, sinks: int) -> list[Tensor]:
    """The logits ``(V,)`` behind every token of ``stream`` but the last."""
    rotations, config = Rotations(model), model.config
    sliding, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"] * count
    governs_sliding = "full_attention" not in kinds and window < (sliding or 0)
    cache = DynamicCache(config=config)
    mine = []
    for i, kind in enumerate(kinds):
        if kind == "full_attention" or (kind == "sliding_attention" and governs_sliding):
            mine.append(OracleLayer(rotations, sinks, window - sinks, kind != "full_attention"))
        elif kind == "sliding_attention":
            mine.append(OracleLayer(rotations, 0, sliding - 1, True))
        else:
            continue
        cache.layers[i] = mine[-1]
    logits = []
    with torch.inference_mode(), rotations.caught():
        for t in range(len(stream) - 1):
            position = min(t, window)
            for layer in mine:
                layer.query = position
            logits.append(_step(model, cache, stream, t, position))
    return logits


class Text(OracleLayer):
    """All keys ever, as they were rotated at their place in the text, of which only the held ones are attended to."""

    def __init__(self, rotations: Rotations, held: Callable[[int], list[int]]) -> None:
        super().__init__(rotations, 0, 0, False)
        self.held, self.fed = held, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotate, self.rotations.latest = self.rotations.latest, None
        if rotate is not None:
            key_states = rotate(key_states, torch.tensor([self.fed]))
        self.keys, self.values = torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)
        seen = [*self.held(self.fed), self.fed]
        self.fed += 1
        return self.keys[:, :, seen], self.values[:, :, seen]

    def get_seq_length(self) -> int:
        return len(self.held(self.fed))


class Ranked(Text):
    """All keys ever, unrotated; the held ones are rotated anew on every step, to their ranks among them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rotate, self.rotations.latest = self.rotations.latest, None
        self.keys, self.values = torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)
        seen = [*self.held(self.fed), self.fed]
        self.fed += 1
        keys = self.keys[:, :, seen]
        if rotate is not None:  # the newest is the last, and stands where the query does
            keys = rotate(keys, torch.arange(self.query - len(seen) + 1, self.query + 1))
        return keys, self.values[:, :, seen]


Rule = Callable[[int, int, int], list[int]]  # number of the layer, of how many, tokens fed: indices in the text held


def by_position(model: PreTrainedModel, stream: Tensor, rule: Rule, positions: str) -> Tensor:
    """The NLL of every token of ``stream`` but the first, from caches that hold what ``rule`` says.

    ``rule`` governs the layers with full attention, and sliding layers (whose own window must then be longer) where
    there are no others. Positions are ``text`` or ``cache``.
    """
    if model.config.model_type in ("bloom", "mpt") or getattr(model.config, "alibi", False):
        return _alibi_in_text(model, stream, rule) if positions == "text" else _ranked(model, stream, rule, Ranked)
    return _ranked(model, stream, rule, Text if positions == "text" else Ranked)


def _ranked(model: PreTrainedModel, stream: Tensor, rule: Rule, kind: type[Text]) -> Tensor:
    rotations, config, count = Rotations(model), model.config, model.config.num_hidden_layers
    sliding = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"] * count
    governed = [i for i, kind_ in enumerate(kinds) if kind_ == "full_attention"] or list(range(count))
    cache, mine, own = DynamicCache(config=config), [], []
    for i, name in enumerate(kinds):
        if i in governed:
            number = governed.index(i)
            layer = kind(rotations, lambda fed, number=number: rule(number, len(governed), fed))
            mine.append(layer)
        elif name == "sliding_attention":
            layer = OracleLayer(rotations, 0, sliding - 1, True)
            own.append(layer)
        else:
            continue
        cache.layers[i] = layer
    logits = []
    with torch.inference_mode(), rotations.caught():
        for t in range(len(stream) - 1):
            position = t if kind is Text else max(len(layer.held(t)) for layer in mine)
            for layer in [*mine, *own]:
                layer.query = position
            logits.append(_step(model, cache, stream, t, position))
    return _nll(logits, stream)


def _alibi_in_text(model: PreTrainedModel, stream: Tensor, rule: Rule) -> Tensor:
    """Dense attention in which what is gone is masked: every term is that of a key's place in the text."""
    modeling, cache, logits = sys.modules[type(model).__module__], DynamicCache(config=model.config), []
    with torch.inference_mode(), ExitStack() as stack:
        if hasattr(modeling, "build_alibi_tensor"):  # it counts what the mask shows: here all are counted
            original = modeling.build_alibi_tensor
            counted = lambda mask, *rest, **more: original(torch.ones_like(mask), *rest, **more)  # noqa: E731
            stack.enter_context(patch.object(modeling, "build_alibi_tensor", counted))
        for t in range(len(stream) - 1):
            mask = torch.zeros(1, t + 1, dtype=torch.long)
            mask[0, [*rule(0, model.config.num_hidden_layers, t), t]] = 1
            out = model(stream[None, t : t + 1], past_key_values=cache, use_cache=True, attention_mask=mask)
            logits.append(out.logits[0, -1].clone())
    return _nll(logits, stream)


def dense(model: PreTrainedModel, stream: Tensor) -> Tensor:
    """The same NLLs from transformers' own cache, which drops nothing."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = [_step(model, cache, stream, t, t) for t in range(len(stream) - 1)]
    return _nll(logits, stream)


def recomputed(model: PreTrainedModel, stream: Tensor, window: int) -> Tensor:
    """The same NLLs without any cache: each from a forward over the last ``window`` tokens before it."""
    with torch.inference_mode():
        logits = [
            model(input_ids=stream[None, max(0, t + 1 - window) : t + 1], use_cache=False).logits[0, -1].clone()
            for t in range(len(stream) - 1)
        ]
    return _nll(logits, stream)


def _step(model: PreTrainedModel, cache: DynamicCache, stream: Tensor, t: int, position: int) -> Tensor:
    places = {"position_ids": torch.tensor([[position]])} if model.config.model_type not in ("bloom", "mpt") else {}
    return model(stream[None, t : t + 1], past_key_values=cache, use_cache=True, **places).logits[0, -1].clone()


def _nll(logits: list[Tensor], stream: Tensor) -> Tensor:
    if not logits:
        return torch.zeros(0, dtype=torch.float64)
    return -torch.stack(logits).double().log_softmax(-1).gather(1, stream[1:, None])[:, 0]
