"""The reference of a run (``--reference``): a second strategy over the same tokens, to diverge from."""

from dataclasses import replace

from sinkbench.config import RunConfig
from sinkbench.errors import UserError
from sinkbench.strategies.plan import Plan
from sinkbench.strategies.registry import Chosen, chosen_by


def reference_run(config: RunConfig) -> RunConfig | None:
    """The run that the reference of ``config`` would be by itself; ``None`` where there is none.

    It has the window of the run, and keys and values are those that the model computes. Where the run's own strategy is
    named, the reference has its parameters and positions; any other has those that are its own.
    """
    alone = config.but(reference=None, kv_format="model", cuda_graphs=False)
    if config.reference is None or config.reference == config.experiment:
        return None if config.reference is None else alone
    objects = replace(config.objects, strategy=None)
    return alone.but(experiment=config.reference, set={}, attention_sink_size=None, positions=None, objects=objects)


def reference_by(config: RunConfig) -> Chosen | None:
    """The strategy that ``--reference`` names, as :func:`reference_run` has it; ``None`` where there is none.

    Raises:
        UserError: no such strategy, or parameters or a window that cannot be.
    """
    name, alone = config.reference, reference_run(config)
    if alone is None:
        return None
    if name is not None and ":" in name:
        raise UserError(f"--reference {name}: give a name of `sinkbench strategies`")
    try:
        return chosen_by(alone)
    except UserError as error:
        raise UserError(f"--reference {name}: {str(error).replace('--experiment ', '')}") from error


def end_of(plan: Plan | None, length: int, trained: int | None) -> int | None:
    """The token at which a reference of ``plan`` ends, as it is none from there on.

    Args:
        plan: of the reference; ``None``: there is none.
        length: tokens of a stream.
        trained: positions the model was trained for; ``None``: not known.

    Returns:
        ``None`` where all tokens are read, or no reference is.
    """
    if plan is None or trained is None or min(length, span(plan) or length) <= trained:
        return None
    return trained


def span(plan: Plan) -> int | None:
    """Positions, the first to the last, over which the attention of a token reaches at most; ``None``: all before it.

    A model has been trained for as many as its context is long.
    """
    if plan.context is not None:
        return plan.context
    spans = [None if layer.gap or layer.policy.window is None else layer.policy.window + 1 for layer in plan.kept]
    bounded = [span for span in spans if span is not None]
    return max(bounded, default=0) if len(bounded) == len(spans) else None
