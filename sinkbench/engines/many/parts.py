"""Parts of a model that take many tokens in one launch each, for as long as a ``with`` lasts.

What a part computes is found by asking it; where our program does not give the same, the part stays as it is. So there
is nothing here about families.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkbench.calls import StandIn, standing_in
from sinkbench.compilers import attempted
from sinkbench.engines.many.later import Activated, Later, Sum, settled
from sinkbench.engines.many.launching import takes
from sinkbench.engines.many.norm import WIDEST, normalise
from sinkbench.engines.many.rotary import Turn
from sinkbench.engines.replacing import ROTATE, rotary_modules
from sinkbench.engines.single.activation import activation_of
from sinkbench.engines.single.norm import Norm, norm_of

ACTIVATIONS = "transformers.activations", "torch.nn.modules.activation"
Part = Callable[..., Any]


@contextmanager
def many_parts(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, in this thread or task alone, norms with the sums before them, activations with what they
    gate, and rotary functions of ``model`` take many tokens quickly."""
    if not _all_on_one_device(model):
        yield
        return
    known = Known()
    parts = {(module, "forward"): part for module in model.modules() if (part := _part(module, known)) is not None}
    turns = {(source, ROTATE): partial(_turned, Turn()) for source in rotary_modules(model)}
    with standing_in({**parts, **turns}):
        yield


def _all_on_one_device(model: PreTrainedModel) -> bool:
    """Whether launches go where all of ``model`` is: to the device in use."""
    devices = {weight.device for weight in model.parameters()}
    return len(devices) == 1 and all(d.type != "cuda" or d.index == torch.cuda.current_device() for d in devices)


def _part(module: nn.Module, known: "Known") -> Part | None:
    """A quicker forward for ``module``, called with its own; ``None`` where it keeps that."""
    if not isinstance(vars(module).get("forward"), StandIn | None):
        return None  # somebody stands before it
    if isinstance(module, nn.Embedding):
        return _begun
    if type(module).__module__ in ACTIVATIONS:
        name = known.activation(module)
        return None if name is None else partial(_activated, name)
    found = known.norm(module)
    return None if found is None or found.weight.shape[0] > WIDEST else partial(_normalised, found)


class Known:
    """What the norms and activations of a model compute; of those that are alike one is asked."""

    def __init__(self) -> None:
        self.norms: dict[tuple[Any, ...], Norm | None] = {}
        self.activations: dict[tuple[Any, ...], str | None] = {}

    def norm(self, module: nn.Module) -> Norm | None:
        """As :func:`norm_of`."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            return None
        key = (*_said(module), weight.shape, weight.dtype, weight.device, bias is None)
        if key not in self.norms:
            found = norm_of(module)
            if found is not None and not weight.any():  # it says nothing of what another weight would show
                return found
            self.norms[key] = found
        known = self.norms[key]
        return None if known is None else replace(known, weight=weight, bias=bias)

    def activation(self, module: nn.Module) -> str | None:
        """As :func:`activation_of`."""
        key = _said(module)
        if key not in self.activations:
            self.activations[key] = activation_of(module, torch.device("cpu"))
        return self.activations[key]


def _said(module: nn.Module) -> tuple[Any, ...]:
    """What makes ``module`` what it is, but for its weights."""
    values = (
        (name, x) for name, x in vars(module).items() if isinstance(x, int | float | str | tuple | None | Callable)
    )
    return type(module), *values


def _begun(own: Part, *args: Any, **kwargs: Any) -> Any:
    """What an embedding answers with: residual sums begin with it."""
    found = own(*args, **kwargs)
    return Later.there(found) if takes(found) else found


def _activated(name: str, own: Part, x: Any) -> Any:
    x = settled(x)
    return Later.of(Activated(x, name)) if takes(x) else own(x)


def _turned(turn: Turn, own: Part, *args: Any, **kwargs: Any) -> Any:
    found = None if kwargs else turn.of(own, args)
    if found is None:
        return own(*args, **kwargs)
    # the query is read at once; the key may turn on its way into a cache
    return (found[0].keep(), Later.of(found[1])) if len(found) == 2 else found[0].keep()


def _normalised(norm: Norm, own: Part, x: Any) -> Any:
    total = x.promise if isinstance(x, Later) else None
    if isinstance(total, Sum) and _fits(norm, total.first):
        found = attempted(normalise, total.first, total.second, norm)
        if found is not None:
            x.kept(found.value)
            return found.out
    x = settled(x)
    across = x.dim() == 4 and not x.is_contiguous()  # heads before tokens
    rows = x.transpose(1, 2) if across else x
    found = attempted(normalise, rows, None, norm) if takes(x) and _fits(norm, rows) else None
    if found is None:
        return own(x)
    return found.out.transpose(1, 2) if across else found.out


def _fits(norm: Norm, x: Tensor) -> bool:
    return x.dtype == norm.weight.dtype and x.shape[-1] == norm.weight.shape[0] and x.is_contiguous()
