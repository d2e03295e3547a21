"""Parts of a model that run on kernels of ours, one token at a time, for as long as a ``with`` lasts.

What a part computes is found by asking it; where our kernel does not give the same, the part stays as it is. So there
is nothing here about families.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sinkbench.attention.kernels.ahead import asking
from sinkbench.attention.kernels.angles import Angles
from sinkbench.engines.replacing import replaced
from sinkbench.engines.single import norm, product, rotary, sums
from sinkbench.engines.single.activation import ACTIVATIONS, activation_of
from sinkbench.engines.single.cosines import cosines_of
from sinkbench.engines.single.ends import End, Ways
from sinkbench.engines.single.experts import experts_of
from sinkbench.engines.single.pending import Pending
from sinkbench.engines.single.pointwise import Overlapping
from sinkbench.engines.single.router import router_of
from sinkbench.engines.single.steady import Steady
from sinkbench.engines.turns import Turns
from sinkbench.positions.rotary import Rope

# Whose modules compute by torch's operations, which are seen one by one. Others, of quantised matrices, may launch
# kernels that nobody sees: what these read has to be there.
SEEN = "torch.", "transformers.models.", "transformers.activations", "transformers.pytorch_utils"


class Parts:
    """The parts of one model: what they share from one to the next."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.pending, self.steady = Pending(), Steady(model)
        self.products = Products(self.pending)

    def ends(self, turns: Sequence[Turns], *end: Tensor) -> None:
        """Prepare to begin steps with these, and to end them as :class:`End` has it."""
        self.ways, self.end = [Ways(one) for one in turns], End(*end)

    def begin(self) -> None:
        """The rotations of this step's query."""
        for ways in self.ways:
            ways.set(self.end.counter, self.end.position)

    def finish(self, logits: Tensor) -> None:
        """The loss of ``logits``, ``(vocabulary,)``; a step ends."""
        self.pending.settle(logits)
        self.end(logits.contiguous())

    def overlapping(self, position: Tensor) -> Overlapping:
        """A context for one forward at this position."""
        return Overlapping(self.pending, self.steady, position)

    def asking(self) -> AbstractContextManager[None]:
        """Within this context forwards ask for kernels, and at its end all are there (:func:`ahead.asking`)."""
        return asking(self.end.tokens.device)

    def learnt(self) -> None:
        """To be called after the first forward, which learns which matrices meet the same vector."""
        self.products.learnt()

    def unturned(self, query: Tensor, key: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Angles | None]:
        """As :func:`rotary.unturned`."""
        return rotary.unturned(query, key, rope, self.pending)


@contextmanager
def single_parts(model: PreTrainedModel) -> Iterator[Parts]:
    """Within this context, matrices, gated feed-forward blocks, norms and rotary functions take one token quickly."""
    parts = Parts(model)
    with replaced(model, partial(_forward, parts=parts), partial(rotary.Turn, pending=parts.pending)):
        yield parts


def _forward(module: nn.Module, parts: Parts) -> Callable[..., Any] | None:
    """A quicker forward for ``module``; ``None`` where it keeps its own."""
    if isinstance(module, nn.Linear) and _multiplies(module):
        return partial(parts.products, module)
    if not type(module).__module__.startswith(SEEN) and not any(module.children()):
        return partial(_settled, module.forward, parts.pending)
    if isinstance(module, nn.Linear):
        return None
    if type(module).__module__ in ("transformers.activations", "torch.nn.modules.activation"):
        return ACTIVATIONS.get(activation_of(module, torch.device("cpu")) or "")
    mixing = experts_of(module, parts.pending) or router_of(module, parts.pending)
    return mixing or _gating(module, parts) or _norming(module, parts) or cosines_of(module)


def _gating(module: nn.Module, parts: Parts) -> Callable[..., Any] | None:
    activation = gated_by(module)
    return None if activation is None else partial(_gated, module, activation, module.forward, parts.pending)


def _norming(module: nn.Module, parts: Parts) -> Callable[..., Any] | None:
    found = norm.norm_of(module)
    return None if found is None else partial(_normalised, found, module.forward, parts.pending)


def _multiplies(module: nn.Linear) -> bool:
    """Whether ``module`` is a matrix and a bias and nothing else, such as a quantised one."""
    weight = module.weight
    if weight.dtype not in product.DTYPES or not weight.is_contiguous():
        return False
    if type(module) is nn.Linear:
        return True
    x = torch.randn(1, 1, module.in_features, dtype=weight.dtype, device=weight.device)
    wanted = F.linear(x, weight, module.bias)
    try:
        return torch.allclose(module(x), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
    except Exception:  # it is called in another way
        return False


class Products:
    """Matrices of a model, those that meet the same vector one after the other in one launch.

    Which do is learnt in the first forward.
    """

    def __init__(self, pending: Pending) -> None:
        self.pending, self.learning = pending, True
        self.last: tuple[Tensor, nn.Linear] | None = None  # met in the forward that is learnt from
        self.companions: dict[nn.Linear, list[nn.Linear]] = {}  # a matrix, and those that follow it
        self.leader: nn.Linear | None = None
        self.ready: dict[nn.Linear, tuple[Tensor, Tensor]] = {}  # what a matrix will be asked, and its answer

    def learnt(self) -> None:
        """To be called after the first forward."""
        self.learning, self.last = False, None

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        if x.numel() != module.in_features or x.dtype != module.weight.dtype:
            return F.linear(x, module.weight, module.bias)
        if self.learning:
            self.pending.settle(x)
            self._learn(module, x)
            return F.linear(x, module.weight, module.bias)
        asked, answer = self.ready.pop(module, (None, None))
        if asked is x and answer is not None:
            return answer
        together = [module, *self.companions.get(module, ())]
        if len(together) == 1:
            return product.promised(x, module.weight, module.bias, self.pending)
        self.pending.settle(x)
        answers = product.products(x.contiguous(), [m.weight for m in together], [m.bias for m in together])
        shaped = [y.view(*x.shape[:-1], -1) for y in answers]
        self.ready |= {m: (x, y) for m, y in zip(together[1:], shaped[1:], strict=True)}
        return shaped[0]

    def _learn(self, module: nn.Linear, x: Tensor) -> None:
        if self.last is not None and self.last[0] is x and self.leader is not None:
            with_it = self.companions[self.leader]
            alike = (self.leader.bias is None) == (module.bias is None)
            if len(with_it) + 1 < product.MOST and alike and module not in (self.leader, *with_it):
                with_it.append(module)
                return
        self.last, self.leader = (x, module), module
        self.companions.setdefault(module, [])


def gated_by(module: nn.Module) -> str | None:
    """The activation of a feed-forward block ``down(activation(gate(x)) * up(x))``; ``None`` for anything else."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    act = getattr(module, "act_fn", None)
    if act is None or not all(type(part) is nn.Linear and part.bias is None for part in parts):
        return None
    gate, up, down = parts
    if not all(_multiplies(part) for part in parts) or gate.weight.shape != up.weight.shape:
        return None
    name = activation_of(act, gate.weight.device)
    if name is None:
        return None
    probe = torch.randn(1, 1, gate.in_features, dtype=gate.weight.dtype, device=gate.weight.device)
    wanted = module(probe)
    got = F.linear(ACTIVATIONS[name](F.linear(probe, gate.weight)) * F.linear(probe, up.weight), down.weight)
    same = isinstance(wanted, Tensor) and torch.allclose(wanted, got, rtol=1e-2, atol=1e-2 * float(got.abs().max()))
    return name if same else None


def _gated(module: Any, activation: str, plain: Callable[[Tensor], Tensor], pending: Pending, x: Tensor) -> Tensor:
    if x.numel() != module.gate_proj.in_features or x.dtype != module.gate_proj.weight.dtype:
        return plain(x)
    pending.settle(x)
    inner = product.gated(x.contiguous(), module.gate_proj.weight, module.up_proj.weight, activation)
    return module.down_proj(inner.view(*x.shape[:-1], -1))


def _settled(plain: Callable[..., Any], pending: Pending, *args: Any, **kwargs: Any) -> Any:
    pending.settle(*args, *kwargs.values())
    return plain(*args, **kwargs)


def _normalised(found: norm.Norm, plain: Callable[[Tensor], Tensor], pending: Pending, x: Tensor) -> Tensor:
    if not x.is_contiguous() or x.dtype != found.weight.dtype:
        return plain(x)
    if x.numel() == x.shape[-1]:
        return sums.normalised(x, found, pending)
    pending.settle(x)
    return found(x)
