"""What strategies that score their entries must answer, by brute force and with no code of the package.

For every layer and head of keys and values there is a plain list of the tokens that are alive. Keys and values of all
tokens lie in lists as they came, keys before any rotation. On every step the alive keys are rotated anew, by the
model's own function and by angles formed here in float64; the softmax is written out, scores are numbers in
dictionaries, and the lowest of those that may go is looked for with ``min``.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

EACH_PAIR_TWICE = {"cohere", "cohere2"}  # how their cosines lie over features; all other families: all pairs twice
NAME = "eviction_oracle"


@dataclass
class Seen:
    """What one head of keys and values holds at one step, the newest token included, all in text order.

    Attributes:
        tokens: indices in the text, ``n`` of them.
        keys: as the query meets them, ``(n, D)``.
        unrotated: keys as they came, ``(n, D)``.
        weights: the shares of each query head of its group in each entry, ``(G, n)``.
        memory: a dictionary that lasts as long as the head.
        layer, head: which this is.
    """

    tokens: list[int]
    keys: Tensor
    unrotated: Tensor
    weights: Tensor
    memory: dict[int, float]
    layer: int
    head: int


Score = Callable[[list[Seen]], list[list[float]]]  # for all heads of a layer: a number for each entry


def h2o(heads: list[Seen], average: bool = False) -> list[list[float]]:
    scores = []
    for seen in heads:
        now = seen.tokens[-1]
        for token, share in zip(seen.tokens, seen.weights.sum(0).tolist()):
            seen.memory[token] = seen.memory.get(token, 0.0) + share
        scores.append([seen.memory[token] / (now - token + 1 if average else 1) for token in seen.tokens])
    return scores


def tova(heads: list[Seen]) -> list[list[float]]:
    assert all(seen.tokens == heads[0].tokens for seen in heads)
    queries = torch.cat([seen.weights for seen in heads])
    return [(queries.sum(0) / len(queries)).tolist()] * len(heads)


def knorm(heads: list[Seen]) -> list[list[float]]:
    return [[-float((key * key).sum().sqrt()) for key in seen.keys] for seen in heads]


def exact_knorm(heads: list[Seen]) -> list[list[float]]:
    """As :func:`knorm`, without rotations: two keys that are equal before them have the same norm to the last bit."""
    return [[-float((key * key).sum().sqrt()) for key in seen.unrotated] for seen in heads]


def keydiff(heads: list[Seen]) -> list[list[float]]:
    scores = []
    for seen in heads:
        unit = [key / (key * key).sum().sqrt() for key in seen.keys]
        mean = torch.stack(unit).sum(0) / len(unit)
        scores.append([-float((key * mean).sum() / (mean * mean).sum().sqrt()) for key in unit])
    return scores


def random(draw: Callable[[int, int, int], float]) -> Score:
    """Scores that are given: ``draw(layer, head, token)``."""
    return lambda heads: [[draw(seen.layer, seen.head, token) for token in seen.tokens] for seen in heads]


@dataclass(frozen=True)
class Settings:
    """What is held: at most ``window`` entries; the first ``sinks`` and the last ``recent`` ones cannot go.

    ``tie``: scores that lie above the lowest by no more than this share of it count as equal.
    """

    score: Score
    window: int
    sinks: int
    recent: int
    positions: str
    tie: float = 0.0


@dataclass
class Answer:
    """What the oracle found.

    Attributes:
        nll: of every token but the first, float64.
        evictions: for each layer and head, the steps at which a token went, and which.
        margins: for each layer, head and step, by how much a score would have to change for another token to go.
    """

    nll: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    evictions: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    margins: dict[tuple[int, int, int], float] = field(default_factory=dict)


class Angles:
    """While :meth:`caught`, queries and keys of ``model`` stay as they are before rotation; :meth:`turn` rotates."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modeling, self.rotate, self.size = sys.modules[type(model).__module__], None, 0
        (self.module,) = [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]
        self.pairs_twice = model.config.model_type in EACH_PAIR_TWICE
        self.dtype = model.dtype

    @contextmanager
    def caught(self) -> Iterator[None]:
        original = self.modeling.apply_rotary_pos_emb

        def leave(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            self.size, self.rotate = k.shape[-1], lambda x, cos, sin: original(x, x, cos, sin, *rest)[1]
            return q, k

        with patch.object(self.modeling, "apply_rotary_pos_emb", leave):
            yield

    def turn(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """``x`` of shape ``(heads, n, D)``, rotated to ``positions``."""
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * self.module.inv_freq.to(torch.float64)
        angles = angles.repeat_interleave(2, dim=1) if self.pairs_twice else torch.cat((angles, angles), dim=1)
        scale = self.module.attention_scaling  # yarn's
        cos, sin = ((part[None] * scale).to(self.dtype) for part in (angles.cos(), angles.sin()))
        turned = self.rotate(x[None, :, :, : self.size], cos, sin)[0]
        return torch.cat((turned, x[:, :, self.size :]), dim=-1)


class Layer(CacheLayerMixin):
    """One layer: everything that ever came, and for each head which of it is alive."""

    supports_early_init = False
    is_sliding = False

    def __init__(self, number: int, settings: Settings, angles: Angles, answer: Answer) -> None:
        super().__init__()
        self.number, self.settings, self.angles, self.answer = number, settings, angles, answer
        self.keys: list[Tensor] = []  # of each token, (heads, D)
        self.values: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.alive: list[list[int]] = [[] for _ in range(key_states.shape[1])]
        self.memory: list[dict[int, float]] = [{} for _ in self.alive]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.append(key_states[0, :, 0].clone())
        self.values.append(value_states[0, :, 0].clone())
        for alive in self.alive:
            alive.append(len(self.keys) - 1)
        return key_states, value_states

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """The outputs ``(H, D)`` of the newest token's queries ``(H, D)``; after that one token of each head goes."""
        outputs, heads = [], []
        groups = query.shape[0] // len(self.alive)
        for head, alive in enumerate(self.alive):
            places = alive if self.settings.positions == "text" else range(len(alive))
            unrotated = torch.stack([self.keys[token][head] for token in alive])
            keys = self.angles.turn(unrotated[None], places)[0]
            queries = self.angles.turn(query[head * groups : (head + 1) * groups, None], places[-1:])[:, 0]
            products = queries @ keys.T * scale
            shares = torch.exp(products - products.max(dim=1, keepdim=True).values)
            shares = shares / shares.sum(dim=1, keepdim=True)
            outputs.append(shares @ torch.stack([self.values[token][head] for token in alive]))
            heads.append(Seen(list(alive), keys, unrotated, shares, self.memory[head], self.number, head))
        for head, scores in enumerate(self.settings.score(heads)):
            self._evict(head, scores)
        return torch.cat(outputs)

    def _evict(self, head: int, scores: list[float]) -> None:
        alive, settings, step = self.alive[head], self.settings, len(self.keys) - 1
        if len(alive) <= settings.window:
            return
        may_go = {
            token: score
            for token, score in zip(alive, scores, strict=True)
            if token >= settings.sinks and token <= step - settings.recent
        }
        lowest = min(may_go.values())
        bound = lowest + settings.tie * abs(lowest)
        victim = min(token for token, score in may_go.items() if score <= bound)
        others = [abs(score - bound) for token, score in may_go.items() if token != victim]
        self.answer.margins[self.number, head, step] = min(others, default=float("inf"))
        self.answer.evictions.setdefault((self.number, head), []).append((step, victim))
        alive.remove(victim)
        self.memory[head].pop(victim, None)

    def get_seq_length(self) -> int:
        return len(self.keys)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.keys) + query_length, 0

    def get_max_length(self) -> int:
        return -1


@contextmanager
def _attention(model: PreTrainedModel, layers: list[Layer]) -> Iterator[None]:
    """Within this context, every attention of ``model`` is that of ``layers``."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        scaling = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return layers[module.layer_idx].attend(query[0, :, 0], scale)[None, None], None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(NAME, forward)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)


def scored(model: PreTrainedModel, stream: Tensor, settings: Settings) -> Answer:
    """What ``model`` says of ``stream`` when each head of each layer keeps what ``settings`` say."""
    answer, angles, nll = Answer(), Angles(model), []
    layers = [Layer(i, settings, angles, answer) for i in range(model.config.num_hidden_layers)]
    cache = Cache(layers=layers)
    with torch.inference_mode(), angles.caught(), _attention(model, layers):
        for t in range(len(stream) - 1):
            out = model(
                stream[None, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]]), use_cache=True
            )
            nll.append(-out.logits[0, -1].double().log_softmax(0)[stream[t + 1]])
    answer.nll = torch.stack(nll)
    return answer
