"""Parts of a model that run compiled for as long as a ``with`` lasts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkbench.engines.replacing import replaced

PARTS = ("Norm", "MLP")


@contextmanager
def compiled_parts(model: PreTrainedModel, worth_it: bool) -> Iterator[None]:
    """On CUDA, within this context, norms, feed-forward blocks and the rotary function of ``model`` run compiled."""
    if not worth_it or model.device.type != "cuda":
        yield
        return

    @cache  # one compiled function a class: a wrapper for each module would cost a short stream more than its layers
    def compiled(kind: type[nn.Module]) -> Callable[..., Any]:
        return torch.compile(kind.forward, dynamic=False)

    def forward_of(module: nn.Module) -> Callable[..., Any] | None:
        kind = type(module)
        return MethodType(compiled(kind), module) if kind.__name__.endswith(PARTS) else None

    with replaced(model, forward_of, partial(torch.compile, dynamic=False)):
        yield
