"""How long generated text stays fluent: what the model itself thinks of it afresh, repetition, and non-words."""

import json
import re
from collections import Counter, deque
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkbench.errors import UserError
from sinkbench.models import embedded
from sinkbench.positions.bare import device_of

BLOCK = 256  # tokens scored together, and tokens of context before them
WINDOW = 256  # tokens over which rates are taken
NGRAM = 4
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


@torch.inference_mode()
def fresh_nll(model: PreTrainedModel, context: Tensor, block: Tensor) -> list[float]:
    """-ln p of each token of ``block`` (int64, shape ``(n,)``) in one dense forward of its own.

    Each token sees ``context`` and the tokens of the block before it, and nothing of any cache.

    Raises:
        UserError: there is no context, so that the first token has nothing to be predicted from.
    """
    if not len(context):
        raise UserError("the prompt is empty: give at least one token to begin with")
    tokens = torch.cat((context, block)).to(device_of(model))
    logits = model(tokens[None, :-1], use_cache=False).logits[0, len(context) - 1 :]
    return cross_entropy(logits.float(), tokens[len(context) :].to(logits.device), reduction="none").tolist()


class Repetition:
    """Over the last :data:`WINDOW` tokens, the share of their 4-grams that occur earlier among them."""

    def __init__(self) -> None:
        self._grams: deque[tuple[int, ...]] = deque()
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._last: deque[int] = deque(maxlen=NGRAM)

    def put(self, token: int) -> float | None:
        """The share after ``token``; ``None`` before the first 4-gram."""
        self._last.append(token)
        if len(self._last) < NGRAM:
            return None
        gram = tuple(self._last)
        self._grams.append(gram)
        self._counts[gram] += 1
        if len(self._grams) > WINDOW - NGRAM + 1:
            old = self._grams.popleft()
            self._counts[old] -= 1
            if not self._counts[old]:
                del self._counts[old]
        return 1 - len(self._counts) / len(self._grams)


class NonWords:
    """Over the text of the last :data:`WINDOW` tokens, the share of its words that are not in ``vocabulary``.

    Words are runs of letters, apostrophes inside included, compared in lower case. The first and the last, which
    may be cut, are not counted.
    """

    def __init__(self, tokenizer: Any, vocabulary: frozenset[str]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._tokens: deque[int] = deque(maxlen=WINDOW)

    def put(self, token: int) -> float | None:
        """The share after ``token``; ``None`` where there are no words, or no vocabulary."""
        self._tokens.append(token)
        words = words_of(self._tokenizer.decode(list(self._tokens), clean_up_tokenization_spaces=False))[1:-1]
        if not words or not self._vocabulary:
            return None
        return sum(word not in self._vocabulary for word in words) / len(words)


def words_of(text: str) -> list[str]:
    """The words of ``text`` in lower case."""
    return [word.lower() for word in WORD.findall(text)]


def vocabulary_of(prompt: str) -> frozenset[str]:
    """The words of the embedded text and of ``prompt``; none where the embedded text is not installed."""
    try:
        path = embedded.text_file()
    except UserError:
        return frozenset()
    words = set(words_of(prompt))
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            words.update(words_of(json.loads(line)["text"]))
    return frozenset(words)
