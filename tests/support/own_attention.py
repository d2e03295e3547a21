"""What strategies that score their entries must answer, by the model's own attention and with no code of the package.

In the text nothing ever leaves the cache: each head's mask hides what is dead. Rotations, ALiBi's terms, caps and
logits that join a softmax are those that the model has for the whole text. In the cache, the alive keys of each head
are rotated anew on every step, by the model's own function, to their ranks. Weights are those that modules answer with.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from eviction_oracle import Answer, Layer, Seen, Settings
from oracle import Rotations
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

MASKS_OF_TRUTHS = ("mpt",)  # whose masks say what is hidden; all others are added to the scores
TAKES_NO_POSITIONS = ("bloom", "mpt")


class Double(TorchFunctionMode):
    """Within this context nothing is computed in float32, whatever a model asks for; so rounding decides nothing."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(_wide, args), **{name: _wide(value) for name, value in (kwargs or {}).items()})


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value


class Own(Layer):
    """Everything that ever came, and for each head of keys and values which of it is alive.

    Args:
        rotations: how keys come unrotated, for positions in the cache; ``None`` for those in the text.
        copies: how many heads that follow one another are copies of one.
        sliding: a window of the layer's own, which no strategy governs.
    """

    def __init__(
        self,
        number: int,
        settings: Settings,
        answer: Answer,
        rotations: Rotations | None,
        copies: int,
        sliding: int | None = None,
    ) -> None:
        super().__init__(number, settings, None, answer)
        self.rotations, self.copies, self.sliding = rotations, copies, sliding
        self.query = 0  # where the newest token stands

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states[:, :: self.copies], value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)
        if self.rotations is None:
            self.met = torch.stack(self.keys, dim=1)
            return self.met[None], torch.stack(self.values, dim=1)[None]
        rotate, self.rotations.latest = self.rotations.latest, None
        keys, values = [], []
        for head in range(key_states.shape[1]):
            alive = self.alive[head // self.copies]
            mine = torch.stack([self.keys[token][head] for token in alive])
            places = torch.arange(self.query - len(alive) + 1, self.query + 1)
            keys.append(mine if rotate is None else rotate(mine[None, None], places)[0, 0])
            values.append(torch.stack([self.values[token][head] for token in alive]))
        self.met = torch.stack(keys)
        return self.met[None], torch.stack(values)[None]

    def hidden(self, heads: int) -> Tensor:
        """Which entries each of so many query heads must not see once the next token is here, ``(1, heads, 1, n)``."""
        if not self.is_initialized or self.rotations is not None:
            return torch.zeros(1, 1, 1, self.get_seq_length() + 1, dtype=torch.bool)
        dead = torch.ones(len(self.alive), len(self.keys) + 1, dtype=torch.bool)
        for row, alive in zip(dead, self.alive, strict=True):
            row[[*alive, -1]] = False
        return dead.repeat_interleave(heads // len(self.alive), dim=0)[None, :, None]

    def choose(self, weights: Tensor) -> None:
        """After a step in which the queries gave these weights, ``(H, n)``."""
        if self.sliding is not None:
            self.alive = [alive[-(self.sliding - 1) :] for alive in self.alive]
            return
        heads = []
        for head, (alive, shares) in enumerate(zip(self.alive, weights.view(len(self.alive), -1, weights.shape[-1]))):
            at = alive if self.rotations is None else slice(None)
            keys = self.met[head * self.copies, at]
            heads.append(Seen(list(alive), keys, keys, shares[:, at], self.memory[head], self.number, head))
        for head, scores in enumerate(self.settings.score(heads)):
            self._evict(head, scores)

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return len(self.keys) if self.rotations is None else len(self.alive[0])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


@contextmanager
def _watched(model: PreTrainedModel, layers: dict[int, Own]) -> Iterator[None]:
    """Within this context attention modules see what layers do not hide, and layers choose by their weights."""

    def mask(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        assert "attention_mask" in kwargs
        hidden = layers[module.layer_idx].hidden(model.config.num_attention_heads)
        added = torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, -torch.inf)
        return args, {**kwargs, "attention_mask": hidden if model.config.model_type in MASKS_OF_TRUTHS else added}

    def choose(module: Any, args: tuple, output: tuple) -> None:
        layers[module.layer_idx].choose(output[1][0, :, 0])

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
                stack.callback(module.register_forward_pre_hook(mask, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(choose).remove)
        yield


def _layers(
    model: PreTrainedModel, settings: Settings, answer: Answer, rotations: Rotations | None
) -> tuple[DynamicCache, dict[int, Own]]:
    config, cache, layers = model.config, DynamicCache(config=model.config), {}
    window, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    governed = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    if "full_attention" not in kinds and settings.window < window:
        governed = list(range(count))
    copied = config.model_type == "falcon" and config.new_decoder_architecture
    copies = config.num_attention_heads // config.num_kv_heads if copied else 1
    for i, kind in enumerate(kinds):
        if i in governed:
            layers[i] = Own(governed.index(i), settings, answer, rotations, copies)
        elif kind == "sliding_attention":
            layers[i] = Own(-1, settings, answer, rotations, copies, sliding=window)
    for i, layer in layers.items():
        cache.layers[i] = layer
    return cache, layers


def by_own_attention(model: PreTrainedModel, stream: Tensor, settings: Settings) -> Answer:
    """What an eager ``model`` says of ``stream`` when each head of each layer keeps what ``settings`` say."""
    answer, nll = Answer(), []
    rotations = Rotations(model) if settings.positions == "cache" else None
    cache, layers = _layers(model, settings, answer, rotations)
    with torch.inference_mode(), _watched(model, layers), ExitStack() as stack:
        if rotations is not None:
            stack.enter_context(rotations.caught())
        for t in range(len(stream) - 1):
            place = t if rotations is None else min(t, settings.window)
            for layer in layers.values():
                layer.query = place
            places = {} if model.config.model_type in TAKES_NO_POSITIONS else {"position_ids": torch.tensor([[place]])}
            out = model(stream[None, t : t + 1], past_key_values=cache, use_cache=True, **places)
            nll.append(-out.logits[0, -1].double().log_softmax(0)[stream[t + 1]])
    answer.nll = torch.stack(nll)
    return answer
