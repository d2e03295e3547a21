"""A model that speaks: text in, one token after another out, under any strategy and in constant memory."""

import time
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.api.forward import read
from sinkbench.cache.batched import BatchedCache
from sinkbench.engines.step import synchronize
from sinkbench.errors import UserError
from sinkbench.positions.bare import device_of
from sinkbench.strategies import Plan


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the distribution.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have at least this probability.
        forbidden: ids that are never chosen.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    forbidden: tuple[int, ...] = ()

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """One id, from logits ``(vocabulary,)``; sampled on the CPU, so that a seed means the same everywhere.

        Raises:
            UserError: they are no numbers.
        """
        logits = logits.float().cpu().clone()
        if not logits.max().isfinite():
            raise UserError("the model's numbers overflow, so that no token is the next: try --dtype float32")
        logits[list(self.forbidden)] = -torch.inf
        if not self.temperature:
            return int(logits.argmax())
        shares, order = (logits / self.temperature).softmax(-1).sort(descending=True)
        left_out = shares.cumsum(-1) - shares >= self.top_p
        left_out[0] = False
        shares[left_out] = 0.0
        return int(order[torch.multinomial(shares, 1, generator=generator)])


@dataclass(frozen=True)
class GeneratedToken:
    """One generated token.

    Attributes:
        token: its id.
        nll: -ln p of it under the model as it was generating, before temperature and top-p.
        latency: seconds of the forward that predicted it.
        kv_cache_bytes: keys and values held after that.
    """

    token: int
    nll: float
    latency: float
    kv_cache_bytes: int


class Session:
    """What a model has read so far, cut as ``plan`` says.

    Raises:
        UserError: the model's positions cannot stream.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.cache = BatchedCache(model, plan) if plan.context is None else None
        self.recent: deque[int] = deque(maxlen=plan.context)
        self._narrow = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values held."""
        return 0 if self.cache is None else self.cache.nbytes

    @property
    def held(self) -> int:
        """Entries held in each full-attention layer; of a fresh window, tokens to be read again."""
        return len(self.recent) if self.cache is None else self.cache.held

    def read(self, tokens: Iterable[int]) -> Tensor:
        """Read more text; the logits ``(vocabulary,)`` of the token that follows it, float32."""
        tokens = list(tokens)
        if self.cache is None:
            self.recent.extend(tokens)
            return self._logits(list(self.recent), use_cache=False)
        with torch.inference_mode():
            given: dict[str, Any] = {"input_ids": self._ids(tokens), **self._narrow}
            return read(self.model, self.model.forward, self.cache, given)["logits"][0, -1].float()

    def _logits(self, tokens: list[int], **kwargs: Any) -> Tensor:
        with torch.inference_mode():
            return self.model(self._ids(tokens), **self._narrow, **kwargs).logits[0, -1].float()

    def _ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=device_of(self.model))


def stream_tokens(
    session: Session, prompt: Iterable[int], sampling: Sampling, generator: torch.Generator
) -> Generator[GeneratedToken]:
    """Read ``prompt``, then say one token after another for ever; each is read when the next one is asked for."""
    tokens = list(prompt)
    while True:
        synchronize()
        begin = time.perf_counter()
        logits = session.read(tokens)
        synchronize()
        latency = time.perf_counter() - begin
        token = sampling.choose(logits, generator)
        nll = -float(logits.log_softmax(-1)[token])
        yield GeneratedToken(token, nll, latency, session.kv_cache_bytes)
        tokens = [token]


class Detokenizer:
    """Tokens to text, piece by piece, looking back at a few tokens only.

    Some tokenizers write a token differently at the start of a text, and some characters take several tokens: a
    piece is what a short stretch of tokens gains by its newest ones, held back while a character is incomplete.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._shown: list[int] = []
        self._new: list[int] = []

    def put(self, token: int) -> str:
        """The text that ``token`` completes; empty while a character is incomplete."""
        self._new.append(token)
        before = self._decode(self._shown)
        after = self._decode(self._shown + self._new)
        if after.endswith("\ufffd") and len(self._new) < 8:
            return ""
        self._shown, self._new = self._new, []
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
