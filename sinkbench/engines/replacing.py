"""Parts of a model that run in another way for as long as a ``with`` lasts."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

ROTATE = "apply_rotary_pos_emb"  # what transformers' models call their rotary function
Function = Callable[..., Any]


def rotary_modules(model: PreTrainedModel) -> list[ModuleType]:
    """Where the rotary functions of ``model`` are found, by the name :data:`ROTATE`."""
    sources = {type(m).__module__ for m in model.modules()}
    return [sys.modules[name] for name in sources if hasattr(sys.modules[name], ROTATE)]


@contextmanager
def replaced(
    model: PreTrainedModel, forward_of: Callable[[nn.Module], Function | None], rotate: Callable[[Function], Function]
) -> Iterator[None]:
    """Within this context, modules have the forwards that ``forward_of`` gives, and rotary functions are ``rotate``'s.

    A module for which there is none, or before which something stands already, keeps its own.
    """
    rotary = rotary_modules(model)
    before = [getattr(source, ROTATE) for source in rotary]
    changed: list[nn.Module] = []
    try:
        for module in model.modules():
            forward = None if "forward" in vars(module) else forward_of(module)
            if forward is not None:
                object.__setattr__(module, "forward", forward)
                changed.append(module)
        for source, function in zip(rotary, before, strict=True):
            setattr(source, ROTATE, rotate(function))
        yield
    finally:
        for module in changed:
            object.__delattr__(module, "forward")
        for source, function in zip(rotary, before, strict=True):
            setattr(source, ROTATE, function)


@contextmanager
def matrices_gathered(model: PreTrainedModel) -> Iterator[None]:
    """Within this context, the matrices of the experts that a token is sent to are gathered, and tokens not grouped.

    As transformers has it while it generates. Groups are formed on the host where torch has no product of groups, on
    CUDA in all but bfloat16, and no graph can capture that; in bfloat16 they stay, as nothing is copied for them.
    """
    before = model.get_experts_implementation()
    grouped = "grouped_mm" if model.dtype != torch.bfloat16 else None
    gathered = {part: "batched_mm" if how == grouped else how for part, how in before.items()}
    if gathered == before:
        yield
        return
    model.set_experts_implementation(gathered)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
