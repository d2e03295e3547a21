"""How far a distribution over the next token is from that of a reference (``--reference``)."""

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from sinkbench.engines.loss import loss
from sinkbench.positions.rotary import wide

Measured: TypeAlias = dict[str, Tensor]  # by column (sinkbench.results.columns), a value a prediction
ROWS = 16  # at a time on a processor, whose caches hold them; a GPU takes all
NEAR = 1.0  # nats between two logarithms from which on the plain terms are the better ones


def divergence(logits: Tensor, reference: Tensor, labels: Tensor) -> Measured:
    """Of next-token distributions q, by ``logits``, and p, by those of a ``reference``, both ``(n, vocabulary)``.

    ``kl`` is the sum of p (ln p - ln q), in nats; ``same_top`` 1 where both have the same most likely token, else 0;
    ``reference_nll`` -ln p of ``labels``, ``(n,)``. All ``(n,)``, in float32 or wider.
    """
    labels, reference = labels.to(logits.device), reference.to(logits.device)
    rows = len(logits) if logits.is_cuda else ROWS
    parts = [
        _divergence(*part) for part in zip(logits.split(rows), reference.split(rows), labels.split(rows), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _divergence(logits: Tensor, reference: Tensor, labels: Tensor) -> Measured:
    ours = log_softmax(logits.to(wide(logits.dtype)), dim=-1)
    theirs = log_softmax(reference.to(wide(reference.dtype)), dim=-1)
    return {
        "kl": _kl(theirs, ours),
        "same_top": (logits.argmax(dim=-1) == reference.argmax(dim=-1)).to(torch.int64),
        "reference_nll": loss(reference, labels),
    }


def _kl(ln_p: Tensor, ln_q: Tensor) -> Tensor:
    """The sum over the last dimension of p d + q - p, where d = ln p - ln q.

    q - p sums to 0, so that is the sum of p d; but each term is at least 0, and an error in the normalisation of
    either cancels, so that small divergences are not lost in the rounding of larger terms. q - p is p (exp(-d) - 1),
    which is exact to the last bits where d is small.
    """
    p, d = ln_p.exp(), ln_p - ln_q
    near = p * (d + torch.expm1(-d))
    far = torch.where(p > 0, p * d, 0.0) + ln_q.exp() - p  # without powers that overflow, and where p is none
    return torch.where(d > -NEAR, near, far).sum(dim=-1)
