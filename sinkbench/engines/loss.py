"""-ln p of the token that comes."""

from torch import Tensor, float64
from torch.nn.functional import cross_entropy

from sinkbench.compilers import compilable, in_use
from sinkbench.positions.rotary import wide


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """-ln p of ``labels``, shape ``(n,)``, under ``logits``, shape ``(n, vocabulary)``, in float32 or wider."""
    labels = labels.to(logits.device)
    kernel = compilable("sinkbench.engines.nll") if in_use(logits) and logits.dtype != float64 else None
    if kernel is not None and not logits.requires_grad:
        return kernel.nll(logits, labels)
    return cross_entropy(logits.to(wide(logits.dtype)), labels, reduction="none")
