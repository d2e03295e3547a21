"""A model without what others have hung on it: its own modules and weights, and nobody's hooks.

What is asked of a bare model no hook sees, no wrapper of its forward runs again within itself, and nothing that the
answer needs, such as frequencies that follow the length, stays on the model.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn


def bare(model: nn.Module) -> Any:
    """``model`` again: the same tensors, in modules of its own."""
    twin = _twin(model)
    vars(twin).pop("forward", None)  # what prepares a model for mixed precision, or for a strategy, and calls it
    return twin


def device_of(model: Any) -> torch.device:
    """Where ``model`` computes, also where its weights lie elsewhere between two calls, as Accelerate offloads them."""
    first = first_parameter(model)
    device = model.device if first is None else first.device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    places = [getattr(one, "execution_device", None) for hook in hooks for one in getattr(hook, "hooks", [hook])]
    return next((torch.device(place) for place in places if place is not None), device)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of ``module.parameters()``, which goes a long way round for every short forward."""
    for parameter in module._parameters.values():
        if parameter is not None:
            return parameter
    for child in module._modules.values():
        found = None if child is None else first_parameter(child)
        if found is not None:
            return found
    return None


def _twin(module: nn.Module) -> nn.Module:
    twin = object.__new__(type(module))
    held = {name: _rebound(value, module, twin) for name, value in vars(module).items()}
    held |= {name: held[name].copy() for name in ("_parameters", "_buffers")}
    held |= {name: type(value)() for name, value in held.items() if name.endswith("_hooks") and isinstance(value, dict)}
    held["_modules"] = {name: child and _twin(child) for name, child in module._modules.items()}
    vars(twin).update(held)
    return twin


def _rebound(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """A method of ``module`` that was put on it, as one of ``twin``."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and value.args and value.args[0] is module:
        return partial(value.func, twin, *value.args[1:], **value.keywords)
    return value
