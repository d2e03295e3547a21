"""The reference of a run (``--reference``): a second strategy over the same tokens, to diverge from."""

from sinkbench.config import RunConfig
from sinkbench.errors import UserError
from sinkbench.strategies.plan import Plan
from sinkbench.strategies.registry import Chosen, choose, chosen_by


def reference_by(config: RunConfig) -> Chosen | None:
    """The strategy that ``--reference`` names, with the window of the run; ``None`` where there is none.

    Keys and values are those that the model computes. Where the run's own strategy is named, the reference has its
    parameters and positions; any other has those that are its own.

    Raises:
        UserError: no such strategy, or parameters or a window that cannot be.
    """
    name = config.reference
    if name is None:
        return None
    if ":" in name:
        raise UserError(f"--reference {name}: give a name of `sinkbench strategies`")
    if name == config.experiment:
        return chosen_by(config.but(kv_format="model"))
    try:
        return choose(name, config.window_size)
    except UserError as error:
        raise UserError(f"--reference {name}: {_about_reference(str(error))}") from error


def _about_reference(line: str) -> str:
    return line.replace("--experiment ", "").replace("--set", "its parameter")


def span(plan: Plan) -> int | None:
    """Positions, the first to the last, over which the attention of a token reaches at most; ``None``: all before it.

    A model has been trained for as many as its context is long.
    """
    if plan.context is not None:
        return plan.context
    spans = [None if layer.gap or layer.policy.window is None else layer.policy.window + 1 for layer in plan.kept]
    bounded = [span for span in spans if span is not None]
    return max(bounded, default=0) if len(bounded) == len(spans) else None
