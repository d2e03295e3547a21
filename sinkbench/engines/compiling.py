"""Parts of a model that run compiled for as long as a ``with`` lasts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from transformers import PreTrainedModel

ROTATE = "apply_rotary_pos_emb"  # what transformers' models call their rotary function


@contextmanager
def compiled_parts(model: PreTrainedModel, worth_it: bool) -> Iterator[None]:
    """On CUDA, within this context, norms, feed-forward blocks and the rotary function of ``model`` run compiled."""
    parts, rotary = [], []
    if worth_it and model.device.type == "cuda":
        parts = [m for m in model.modules() if type(m).__name__.endswith(("Norm", "MLP"))]
        sources = {type(m).__module__ for m in model.modules()}
        rotary = [sys.modules[name] for name in sources if hasattr(sys.modules[name], ROTATE)]
    before = [getattr(source, ROTATE) for source in rotary]
    # one compiled function a class: a wrapper for each module would cost a short stream more than its layers
    forwards = {kind: torch.compile(kind.forward, dynamic=False) for kind in {type(m) for m in parts}}
    for module in parts:
        object.__setattr__(module, "forward", MethodType(forwards[type(module)], module))
    for source, rotate in zip(rotary, before, strict=True):
        setattr(source, ROTATE, torch.compile(rotate, dynamic=False))
    try:
        yield
    finally:
        for module in parts:
            object.__delattr__(module, "forward")
        for source, rotate in zip(rotary, before, strict=True):
            setattr(source, ROTATE, rotate)
