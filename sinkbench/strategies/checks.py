"""What a strategy of one's own may get wrong, said in one line before anything is loaded."""

from typing import Any

from sinkbench.config import POSITIONS
from sinkbench.errors import UserError
from sinkbench.strategies.base import Eviction, Strategy
from sinkbench.strategies.policy import Policy

CHOICES = ("head", "layer")


def check_kind(kind: Any, where: str) -> None:
    """Refuse what is no strategy, or says too little to be one.

    Raises:
        UserError: one line that begins with ``where``.
    """
    if not isinstance(kind, type) or not issubclass(kind, Strategy):
        raise UserError(
            f"{where} is no strategy: it must be a class derived from sinkbench.strategies.Strategy or Eviction"
        )
    missing = None
    if issubclass(kind, Eviction):
        if kind.score is Eviction.score and kind.policy is Eviction.policy:
            missing = "score(self, held), what each entry is worth"
    elif kind.policy is Strategy.policy:
        missing = "policy(self, window, layer, layers), what a layer keeps"
    if missing:
        raise UserError(f"{where} is no strategy yet: it must say, in {missing}")
    allowed = {"positions": POSITIONS, "choice": CHOICES if issubclass(kind, Eviction) else None}
    for name, values in allowed.items():
        if values and getattr(kind, name) not in values:
            raise UserError(f"{where}: {name} must be one of {', '.join(values)} (got {getattr(kind, name)!r})")
    memory = getattr(kind, "memory", ())
    if not isinstance(memory, tuple) or not all(isinstance(name, str) for name in memory):
        raise UserError(f'{where}: memory must be a tuple of names, such as ("total",) (got {memory!r})')


def policy_of(strategy: Strategy, name: str, window: int, layer: int = 0, layers: int = 1) -> Policy:
    """As :meth:`Strategy.policy`.

    Raises:
        UserError: parameters that do not go with the window, or one line for an answer that is no policy, or none.
    """
    try:
        policy = strategy.policy(window, layer, layers)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: policy failed for a window of {window}: {in_a_line(error)}") from error
    if not isinstance(policy, Policy):
        raise UserError(f"{name}: policy must answer with a Policy (got {policy!r})")
    counts = {"sinks": policy.sinks, "block": policy.block, "protected": policy.protected}
    counts |= {} if policy.window is None else {"window": policy.window}
    for count, value in counts.items():
        if not isinstance(value, int) or value < (1 if count == "block" else 0):
            raise UserError(f"{name}: a policy counts in whole numbers of tokens (got {count}={value!r})")
    return policy


def in_a_line(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
