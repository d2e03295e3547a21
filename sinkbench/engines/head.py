"""The language-model head, in slices, and what is measured of its logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkbench.calls import standing_in
from sinkbench.engines.divergence import Measured, divergence
from sinkbench.engines.loss import loss
from sinkbench.errors import UserError

SLICE_BYTES = 64 * 2**20  # of float32 logits at a time
ON_GPU = 4  # times as much there: the head is read anew for each slice, and its product has rows enough for the device
TILE = 256  # rows of a product that a GPU forms together: what is no multiple of it is paid for as if it were


def backbone(model: PreTrainedModel) -> Any:
    """The model without its head: what answers with hidden states.

    Raises:
        UserError: the model does not say which part that is.
    """
    body = model.get_decoder()
    if body is None or body is model:
        raise UserError(f"{type(model).__name__} does not separate its head from its body: use --engine stepwise")
    return body


def measured(model: PreTrainedModel, hidden: Tensor, labels: Tensor, reference: Tensor | None = None) -> Measured:
    """What the head makes of ``hidden``, ``(n, width)``: ``nll`` of ``labels``, ``(n,)``, in float32 or wider.

    With the hidden states of a ``reference`` for the same tokens, how far the distributions are from its own too
    (:func:`sinkbench.engines.divergence.divergence`). Logits never exist in full: both go through the head in slices.

    The head is the model's own forward with the body replaced by its result, so that whatever the model does
    to its logits (soft caps, scales) is done here too.
    """
    rows = _rows(model.get_output_embeddings().weight.shape[0], hidden.is_cuda)
    out = []
    for begin in range(0, len(labels), rows):
        part, wanted = slice(begin, begin + rows), labels[begin : begin + rows]
        logits = _logits(model, hidden[part], wanted)
        found = {"nll": loss(logits, wanted)}
        if reference is not None:
            found |= divergence(logits, _logits(model, reference[part], wanted), wanted)
        out.append(found)
    return {name: torch.cat([found[name] for found in out]) for name in out[0]}


def _rows(vocabulary: int, on_gpu: bool) -> int:
    """Rows of a slice."""
    rows = max(1, SLICE_BYTES * (ON_GPU if on_gpu else 1) // (4 * vocabulary))
    return rows // TILE * TILE if on_gpu and rows > TILE else rows


def _logits(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """``(n, vocabulary)``; the body is asked for ``labels``, which it does not look at."""
    with _body_answers(model, hidden[None]):
        return model(input_ids=labels[None], use_cache=False).logits[0]


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
