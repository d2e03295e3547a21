"""The language-model head and the loss, in slices."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sinkbench.calls import standing_in
from sinkbench.errors import UserError
from sinkbench.positions.rotary import wide

SLICE_BYTES = 64 * 2**20  # of float32 logits at a time


def backbone(model: PreTrainedModel) -> Any:
    """The model without its head: what answers with hidden states.

    Raises:
        UserError: the model does not say which part that is.
    """
    body = model.get_decoder()
    if body is None or body is model:
        raise UserError(f"{type(model).__name__} does not separate its head from its body: use --engine stepwise")
    return body


def nll_of(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """-ln p of ``labels``, shape ``(n,)``, under the head applied to ``hidden``, ``(n, width)``; float32 or wider.

    The head is the model's own forward with the body replaced by its result, so that whatever the model does
    to its logits (soft caps, scales) is done here too.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(1, SLICE_BYTES // (4 * vocabulary))
    out = []
    for part, wanted in zip(hidden.split(rows), labels.split(rows), strict=True):
        with _body_answers(model, part[None]):
            logits = model(input_ids=wanted[None], use_cache=False).logits[0]
        out.append(loss(logits, wanted))
    return torch.cat(out)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of ``labels``, shape ``(n,)``, under ``logits``, shape ``(n, vocabulary)``, in float32 or wider."""
    return cross_entropy(logits.to(wide(logits.dtype)), labels.to(logits.device), reduction="none")


@dataclass
class _Answer:
    """What a body answers with: its last hidden states, and nothing else that a head may ask for."""

    last_hidden_state: Tensor

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


@contextmanager
def _body_answers(model: PreTrainedModel, hidden: Tensor) -> Iterator[None]:
    """Within this context, in this thread or task alone, the body of ``model`` answers with ``hidden`` to anything."""
    asked = []

    def answer(*args: Any, **kwargs: Any) -> _Answer:
        asked.append(True)
        return _Answer(hidden)

    with standing_in({(backbone(model), "forward"): answer}):
        yield
    if not asked:  # its logits would be those of other tokens
        raise UserError(f"the head of {type(model).__name__} does not read its body: use --engine stepwise")
